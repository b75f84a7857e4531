"""docs/contract.md: its table is made from the tests' parameters, so that it says what is tested, of which function."""

import re
from pathlib import Path

import conftest  # noqa: F401  lets bench be found where this is a script
import test_contract
import test_fuzz
import test_operators

from nearfar.registry import OPERATORS, PARTS, STEPS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "contract.md"
FUNCTIONS = [entry.function.__name__ for entry in (*OPERATORS, *PARTS, *STEPS)]
PROPERTIES = {
    "accuracy, drawn calls": [test_fuzz.test_fuzz],
    "accuracy, kernels": [test_operators.test_kernels_against_the_oracle],
    "accuracy, reference": [test_operators.test_reference_against_the_oracle],
    "determinism": [test_operators.test_the_same_bits_every_time],
    "batch invariance": [test_contract.test_batch_invariance, test_contract.test_steps_are_batch_invariant],
    "131,200 batch-heads": [test_contract.test_batch_invariance_of_131200_batch_heads],
    "isolation of tokens": [test_contract.test_tokens_reach_those_that_see_them_and_no_others],
    "NaN of a batch element": [
        test_contract.test_nan_of_one_batch_element_stays_there, test_contract.test_nan_of_a_sequence_of_a_step_stays_there,
    ],
    "NaN of a packed sequence": [test_contract.test_nan_of_one_packed_sequence_stays_there],
    "NaN of a query": [test_contract.test_nan_of_a_query_is_seen_in_its_row_alone],
    "poison": [test_operators.test_every_element_of_outputs_and_workspaces_is_written],
    "layouts": [
        test_contract.test_tensors_of_any_rank_come_in_any_layout, test_contract.test_steps_take_tensors_in_any_layout,
    ],
    "expanded gradients": [test_contract.test_expanded_gradients],
    "out as it lies": [test_contract.test_out_of_a_step_is_written_as_it_lies],
    "empty sizes": [test_contract.test_empty_sizes],
    "default device and dtype": [test_contract.test_another_default_device_and_dtype],
    "in-place writes": [test_contract.test_steps_write_where_autograd_sees_it],
    "compile, one graph": [
        test_contract.test_one_graph_for_all_lengths, test_contract.test_steps_compile_without_graph_break,
    ],
    "export with a dynamic length": [
        test_contract.test_export_with_a_dynamic_length, test_contract.test_exported_kernels_take_every_length,
        test_contract.test_the_reference_selects_among_any_number_of_keys,
    ],
    "opcheck": [test_operators.test_opcheck],
    "fake and meta": [
        test_operators.test_fake_and_meta_tensors_tell_shapes_strides_and_dtypes,
        test_contract.test_steps_of_fake_and_meta_tensors,
    ],
    "autocast": [test_operators.test_autocast],
    "autocast, float64, integers": [test_contract.test_autocast_leaves_float64_and_integers_alone],
    "checkpointing": [test_operators.test_activation_checkpointing],
    "checkpointing, reentrant": [test_contract.test_reentrant_checkpointing],
    "CUDA graphs": [test_operators.test_cuda_graph],
    "streams": [test_operators.test_other_stream],
    "forward derivatives, reference": [test_contract.test_forward_derivatives_of_the_reference],
    "forward derivatives, kernels: refused": [test_contract.test_forward_derivatives_of_the_kernels_are_refused],
    "second derivatives, reference": [test_operators.test_reference_derivatives],
    "second derivatives, kernels: refused": [test_operators.test_double_backward_of_the_kernels_is_refused],
    "batched gradients": [test_contract.test_batched_gradients_are_those_of_a_loop],
    "vmap": [test_contract.test_vmap_is_a_loop],
    "threads": [test_contract.test_threads_get_what_one_gets],
    "errors name the argument": [
        test_contract.test_errors_name_the_argument, test_contract.test_too_many_candidates_of_a_kernel_are_an_error,
    ],
}


def covered_by(tests):
    """Names of the functions that are parameters of these tests."""
    found = set()
    for test in tests:
        for mark in test.pytestmark:
            if mark.name == "parametrize":
                for case in mark.args[1]:
                    value = case.values[0] if hasattr(case, "values") and not isinstance(case, dict) else case
                    found.add(value if isinstance(value, str) else getattr(getattr(value, "function", None), "__name__", None))
    return found


def table():
    head = ["property", *(name.replace("_attention", "").replace("_", " ") for name in FUNCTIONS)]
    rows = [head, ["---"] * len(head)]
    for name, tests in PROPERTIES.items():
        covered = covered_by(tests)
        rows.append([name, *("yes" if function in covered else "-" for function in FUNCTIONS)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def test_the_table_of_the_contract():
    """`PYTHONPATH=tests python tests/ops/test_contract_page.py` writes it."""
    assert re.search(r"<!-- contract -->\n(.*?)\n?<!-- /contract -->", PAGE.read_text(), re.DOTALL)[1] == table()


def test_every_test_of_the_contract_is_a_property():
    shown = {test.__name__ for tests in PROPERTIES.values() for test in tests}
    of_operators = {
        name for name, test in vars(test_contract).items()
        if name.startswith("test_") and any(function in covered_by([test]) for function in FUNCTIONS)
    }
    assert of_operators <= shown


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition("<!-- contract -->\n")
    after = rest.partition("<!-- /contract -->")[2]
    PAGE.write_text(f"{before}<!-- contract -->\n{table()}\n<!-- /contract -->{after}")
