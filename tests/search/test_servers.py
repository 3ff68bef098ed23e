"""Workers on servers: databases, and the gRPC proxy in front of one."""

import pytest
import torch
from servers import database, free_port, proxy
from studies import SPACE, evaluate, study
from test_workers import in_threads, texts

from heretic_kl.ablation import SiteKey, ablation_operator
from heretic_kl.errors import StudyError
from heretic_kl.files import sha256_file
from heretic_kl.search import PlanStore, check_storage, open_storage, serve
from heretic_kl.search.storage import proxy as proxy_module
from heretic_kl.search.storage import study_names

STARTS = len(SPACE.known_good())


@pytest.fixture(scope="module", params=["postgresql", "mysql", "proxy"])
def url(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    if request.param == "proxy":
        yield proxy(f"sqlite:///{folder / 'x.db'}")
        return
    with database(request.param) as where:
        yield where


def test_workers_share_a_study_on_a_server(url, tmp_path):
    ran = []

    def work(number):
        with open_storage(url, tmp_path, "s") as storage:
            list(study(storage).run(STARTS + 5, lambda edits: ran.append(1) or evaluate(edits)))

    in_threads(3, work)
    with open_storage(url, tmp_path, "s") as storage:
        complete = [record for record in study(storage).records if record.state == "complete"]
    assert len(complete) == len(ran) == len(set(texts(complete))) == STARTS + 5


def test_learned_edits_reach_machines_that_share_no_disk(url, tmp_path):
    plan = {SiteKey(0, "mlp", "a.b"): ablation_operator(torch.randn(30_000), 0.5)}
    with open_storage(url, tmp_path, "s") as storage:
        digest = PlanStore(tmp_path / "here", "s", storage).save(plan)
    with open_storage(url, tmp_path, "s") as storage:
        elsewhere = PlanStore(tmp_path / "elsewhere", "s", storage)
        (loaded,) = elsewhere.load(digest).values()
        assert torch.equal(loaded.left, next(iter(plan.values())).left)
        elsewhere.copy(digest, tmp_path / "saved" / "learned.safetensors")
        assert sha256_file(tmp_path / "saved" / "learned.safetensors") == digest
        with pytest.raises(StudyError, match="is missing"):
            elsewhere.load("0" * 64)
        assert study_names(storage) in (["s"], [])


def test_what_is_no_proxy_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(proxy_module, "CONNECT_SECONDS", 0.1)
    for url, message in (
        (f"grpc://127.0.0.1:{free_port()}", "nobody answers at grpc://.*storage serve"),
        ("grpc://", "write grpc://HOST:PORT"),
        ("grpc://host:many", "write grpc://HOST:PORT"),
    ):
        with pytest.raises(StudyError, match=message):
            check_storage(url, tmp_path, None)
    with pytest.raises(StudyError, match="is itself a proxy"):
        serve("grpc://host:1", "127.0.0.1", 1)


def test_a_port_in_use_is_one_line(tmp_path):
    taken = proxy(f"sqlite:///{tmp_path / 'x.db'}")
    with open_storage(taken, tmp_path, "s"):
        port = int(taken.rpartition(":")[2])
        with pytest.raises(StudyError, match=f"cannot listen at 127.0.0.1:{port}"):
            serve(f"sqlite:///{tmp_path / 'x.db'}", "127.0.0.1", port)
