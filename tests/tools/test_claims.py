"""Language models and the other measurements behind docs/claims.md: their parts, small runs, and the page itself."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module


@pytest.fixture
def text(tmp_path):
    """A folder of files, of which a tenth is held out."""
    folder = tmp_path / "text"
    for index in range(60):
        path = folder / f"package{index % 3}/module{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"def function{index}(x):\n    return x + {index}\n" * 4)
    return folder


def test_the_page_is_that_of_the_records(examples):
    claims = examples("claims")
    page = claims.PAGE.read_text()
    assert claims.written(page) == page
    rows = [line for line in page.split("<!-- /claims -->")[0].splitlines() if line.startswith("| [")]
    assert len(rows) == len(claims.CLAIMS) >= 20
    assert {claim.paper for claim in claims.CLAIMS} == {
        *("2602.11534", "2602.12128", "2602.14445", "2602.23057", "2603.06248", "2603.13085", "2602.01893")
    }
    for claim, row in zip(claims.CLAIMS, rows, strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 6 and claim.says == cells[1]
        assert (cells[4] == "not run") == (not cells[2]) == (not cells[3])
        assert (ROOT / "examples" / claim.command.split()[0]).exists()


@pytest.mark.parametrize(
    "differences, verdict",
    [
        ([0.1, 0.12, 0.11], "supported"),
        ([-0.1, -0.12, -0.11], "contradicted"),
        ([0.1, -0.01, 0.1], "not seen"),
        ([0.01, 0.2, 0.01], "not seen"),  # of one sign, but they differ by more than their mean
        ([0.0], "not seen"),
        ([0.2], "supported (one seed)"),
        ([math.nan, 0.1, 0.1], "not seen"),
    ],
)
def test_verdicts(examples, differences, verdict):
    assert examples("claims").judged(differences) == verdict


def test_a_row_that_a_page_lacks(examples):
    claims = examples("claims")
    assert claims.cells("examples.md", "train_digits", "softmax")["parameters"] == "152,593"
    with pytest.raises(ValueError, match="docs/examples.md has no row transformer"):
        claims.cells("examples.md", "train_digits", "transformer")


def test_text_is_split_by_the_hash_of_the_path(examples, text):
    data = examples("bytelm.data")
    found = data.load(text)
    assert found.files == 60 and len(found.train) > len(found.held_out) > 0
    assert len(found.train) + len(found.held_out) == sum(path.stat().st_size + 1 for path in text.rglob("*.py"))
    (text / "package0/tests").mkdir()
    (text / "package0/tests" / "case.py").write_text("skipped")
    assert data.load(text).digest == found.digest
    held_out = bytes(found.held_out.tolist()).split(b"\0")[:-1]
    (text / "added.py").write_text("new")
    more = data.load(text)
    assert more.digest != found.digest
    assert set(held_out) <= set(bytes(more.held_out.tolist()).split(b"\0"))  # no file changes sides


def test_windows_are_spaced_over_the_whole_text(examples):
    data = examples("bytelm.data")
    windows = data.spaced(torch.arange(100, dtype=torch.uint8), 3, context=9)
    assert windows[:, 0].tolist() == [0, 45, 90] and windows[-1].tolist() == list(range(90, 100))


def test_missing_text_and_missing_gpu_are_one_line(examples, tmp_path):
    language = examples("language")
    with pytest.raises(SystemExit, match="^[^\n]*: 0 bytes of [^\n]*--text takes another folder$"):
        language.main(["--text", str(tmp_path / "nowhere")])
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="^--gpu needs a CUDA device[^\n]*$"):
            language.main(["--gpu"])


def model(examples, name, seed=0):
    parts = examples("bytelm.model")
    torch.manual_seed(seed)
    return parts.ByteModel(parts.ATTENTIONS[name], parts.Size(dim=32, heads=2, layers=2, context=24)).eval()


NAMES = (
    *("softmax", "sink", "gated", "affine", "affine gated", "halved", "krause", "krause gated"),
    *("linear", "hadamard", "synchronization"),
)


def test_names_are_those_of_the_models(examples):
    assert list(examples("bytelm.model").ATTENTIONS) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_models_start_alike_and_read_the_past_only(examples, name):
    softmax, other = model(examples, "softmax").state_dict(), model(examples, name)
    assert all(torch.equal(softmax[key], other.state_dict()[key]) for key in softmax)
    tokens = torch.zeros(1, 24, dtype=torch.int64)
    changed = tokens.index_fill(1, torch.tensor(15), 1)
    with torch.no_grad():
        difference = (other(changed) - other(tokens)).abs().amax((0, 2))
    assert difference[:15].max() == 0 and difference[15:].max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_weights_times_values_are_the_outputs(examples, name):
    torch.manual_seed(1)
    attention = model(examples, name).blocks[0].attention
    x = torch.randn(2, 24, 32)
    q, k, v = attention.project(x)
    weights = attention.weights(x)
    assert weights.shape == (2, 2, 24, 24) and weights.triu(1).abs().max() == 0
    torch.testing.assert_close(weights @ v, attention.attend(x, q, k, v), rtol=1e-4, atol=1e-5)
    if name in ("softmax", "linear", "krause"):
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 24), rtol=1e-4, atol=1e-4)


def test_affine_moves_its_average_in_training_only(examples):
    attention = model(examples, "affine").blocks[0].attention
    x = torch.randn(2, 24, 32)
    attention(x)
    assert attention.alpha_average.tolist() == [0, 0]
    attention.train()(x)
    alpha = (0.1 * attention.alpha_proj(x) + 0.5).clamp(0, 1).mean((0, 1))
    torch.testing.assert_close(attention.alpha_average, 0.1 * alpha)


def test_norms_of_a_run(examples):
    report = examples("bytelm.report")
    run = {"gradient_norms": [9.0, 1, 2, 3, 4, 100, *[2.5] * 600]}
    assert report.norms(run).shape == (500,)
    run = {"gradient_norms": [9.0, 1, 2, 3, 4, 20]}  # from step 1: median 3, deviations 2 1 0 1 17
    assert report.variance(run, 1) == pytest.approx(62.5)
    assert report.variation(run, 1) == pytest.approx(62.5**0.5 / 6)
    assert [report.spikes(run, times, 1) for times in (6, 9, 17)] == [1, 1, 0]


@pytest.mark.full
def test_language_measures_resumes_and_becomes_a_claim(examples, text, tmp_path, monkeypatch, capsys):
    language, claims, train = examples("language"), examples("claims"), examples("bytelm.train")
    monkeypatch.setattr(language, "CPU", train.CPU._replace(batch=2, held_out=4, watched=2))
    options = ["--text", str(text), "--seeds", "1", "--steps", "6", "--out", str(tmp_path / "cpu")]
    language.main([*options, "--models", "softmax"])
    (first,) = json.loads((tmp_path / "cpu/language.json").read_text())["runs"]
    record = language.main([*options, "--models", "softmax", "affine", "--resume"])
    assert record == json.loads((tmp_path / "cpu/language.json").read_text())
    assert record["runs"][0] == first and [run["model"] for run in record["runs"]] == ["softmax", "affine"]
    for run in record["runs"]:
        assert len(run["losses"]) == len(run["gradient_norms"]) == 6 and run["losses"][-1] < run["losses"][0]
        assert 0 < run["bits_per_byte"] < 10 and run["tokens_per_second"] > 0
        for when in ("before", "after"):
            assert all(0 < mass < 1 for mass in run[when]["first_token_mass"]) and len(run[when]["entropy"]) == 2
            assert all(0 < entropy < math.log(128) for entropy in run[when]["entropy"])
    assert (tmp_path / "cpu/language.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="has other settings"):
        language.main([*options[:-4], "--steps", "7", *options[-2:], "--resume"])

    monkeypatch.setattr(examples("records"), "RESULTS", tmp_path)
    finding = claims.language(claims.bits, 3, "bits per byte", "affine")()
    softmax, affine = (run["bits_per_byte"] for run in record["runs"])
    assert finding.measured == f"bits per byte: {affine:.3f}, softmax {softmax:.3f}"
    assert finding.verdict == ("supported (one seed)" if affine < softmax else "contradicted (one seed)")
    assert "6 steps, 1 seeds" in finding.size
    assert claims.language(claims.bits, 3, "bits per byte", "krause gated")() is None
    assert "not run" in claims.written(claims.PAGE.read_text())


@pytest.mark.full
def test_locking_measures_shares_beside_losses(examples, text, tmp_path, monkeypatch):
    locking, language, train = examples("locking"), examples("language"), examples("bytelm.train")
    monkeypatch.setattr(language, "CPU", train.CPU._replace(batch=2, held_out=2, watched=1))
    monkeypatch.setattr(locking, "FACTORS", (0.1,))
    record = locking.main(["--text", str(text), "--seeds", "1", "--steps", "6", "--out", str(tmp_path)])
    softmax, paper, small = record["runs"]
    assert [run["model"] for run in record["runs"]] == ["softmax", "1 (paper)", "0.1 D^-1/2"]
    assert math.isnan(locking.share(softmax, "after"))
    assert locking.share(paper, "before") < 0.2 and locking.share(small, "before") > 0.9


@pytest.mark.full
def test_two_factors_and_one_are_fitted(examples, tmp_path, monkeypatch):
    script = examples("approximate_softmax")
    monkeypatch.setattr(script, "CPU", script.CPU | {"context": 16, "batch": 2})
    monkeypatch.setattr(script, "WIDTHS", (16,))
    record = script.main(["--seeds", "1", "--steps", "40", "--out", str(tmp_path)])
    one, two = (run["error"] for run in record["runs"])
    assert 0 < one < 1.2 and 0 < two < 1.2 and one != two
    teacher = script.Teacher(script.CPU, torch.Generator().manual_seed(0))
    x = torch.randn(2, 16, 64)
    o, v = teacher(x)
    q, k = (teacher.split(x @ w) for w in (teacher.q, teacher.k))
    scores = (script.SHARPNESS * q @ k.mT / 32**0.5).masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf)
    torch.testing.assert_close(o, scores.softmax(-1) @ v, rtol=1e-4, atol=1e-5)


def test_a_wide_network_approaches_its_limit(examples):
    script = examples("wide_limit")
    generator = torch.Generator().manual_seed(0)
    x, x_test = torch.randn(2, 12, 4, generator=generator, dtype=torch.float64) / 2
    y = x[:, 0].sign()
    limit, rate = script.limit_prediction(x, y, x_test, steps=50)
    found = [
        script.network_prediction(x, y, x_test, width, 50, rate, torch.Generator().manual_seed(1)) for width in (64, 40_000)
    ]
    narrow, wide = ((prediction - limit).norm() / limit.norm() for prediction in found)
    assert wide < 0.03 and wide < narrow / 5
    # The closed form is gradient descent with the limit's kernel.
    kernel, alpha = script.limit_kernel(x, x), torch.zeros_like(y)
    for _ in range(50):
        alpha = alpha + rate * (y - kernel @ alpha)
    torch.testing.assert_close(limit, script.limit_kernel(x_test, x) @ alpha)


@pytest.mark.full
def test_wide_limit_prints_what_it_measured(examples, tmp_path, monkeypatch, capsys):
    script = examples("wide_limit")
    monkeypatch.setattr(script, "CPU", {"widths": [16, 256], "steps": 5, "points": 20, "held_out": 20})
    record = script.main(["--seeds", "2", "--out", str(tmp_path)])
    assert len(record["runs"]) == 2 * 3 * 2 and all(run["distance"] > 0 for run in record["runs"])
    assert "unit pixels" in capsys.readouterr().out


@pytest.mark.full
def test_clusters_prints_what_is_left(examples, tmp_path, capsys):
    script = examples("clusters")
    record = script.main(["--seeds", "2", "--particles", "12", "--steps", "40", "--out", str(tmp_path)])
    cases = [(surface, bound) for surface in script.SURFACES for bound in script.BOUNDS]
    assert [(run["surface"], run["bound"]) for run in record["runs"]] == cases
    assert all(1 <= count <= 12 for run in record["runs"] for count in run["clusters"])
    assert "softmax: no bound" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"clusters.json", "clusters.png"}
