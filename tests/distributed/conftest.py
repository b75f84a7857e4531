import pytest
from pool import Pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    pool = Pool(tmp_path_factory.mktemp("store") / "store")
    yield pool
    pool.close()
