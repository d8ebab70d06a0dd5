"""A Dask cluster of real processes gives the bytes of a local run, loses workers on the way, and says what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from checkpoint_maker import make_checkpoint, make_sparse_checkpoint, moe_config, text_config, weights_for
from hub_server import TOKEN, serving
from statistics_maker import make_statistics

import pocketquant
from pocketquant import cluster, open_model, open_recipe, plan, read_importance, write
from pocketquant.calibration.importance import ImportanceSums, write_sums
from pocketquant.calibration.statistics import open_statistics
from pocketquant.demo import checkpoint_dir
from pocketquant.errors import ClusterError, SourceError
from pocketquant.formats import QuantFormat, U8Array
from pocketquant.model import Tensor
from pocketquant.quant.rounding.encoding import with_rounding

distributed = pytest.importorskip("distributed", reason="Dask is not installed; pip install 'pocketquant[cluster]'")

COMMAND = str(Path(sys.executable).with_name("pocketquant"))
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "MODELSCOPE_"))}


@dataclass
class Machines:
    """A scheduler and its workers, processes of this machine."""

    folder: Path
    scheduler: subprocess.Popen[bytes] | None = None
    workers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.file = self.folder / "scheduler.json"
        self.scheduler = self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--no-show")
        self._wait(self.file.exists)
        self.tcp = json.loads(self.file.read_text())["address"]
        self.address = self.tcp.replace("tcp://", "dask://")

    def add_worker(self, **environment: str) -> str:
        """Starts one; gives its address."""
        with self.client() as client:
            before = set(client.nthreads())
            options = ("--no-nanny", "--nthreads", "1", "--no-dashboard", "--local-directory", str(self.folder))
            process = self._start("worker", *options, **environment)
            self._wait(lambda: set(client.nthreads()) - before)
            (address,) = set(client.nthreads()) - before
        self.workers[address] = process
        return address

    def kill_worker(self, address: str) -> None:
        self.workers[address].kill()
        self.workers.pop(address).wait()
        with self.client() as client:
            self._wait(lambda: address not in client.nthreads())

    def signal_workers(self, number: int) -> None:
        for process in self.workers.values():
            process.send_signal(number)

    @contextmanager
    def client(self) -> Iterator[distributed.Client]:
        with distributed.Client(self.tcp, set_as_default=False) as client:
            yield client

    def stop(self) -> None:
        for process in [*self.workers.values(), self.scheduler]:
            assert process is not None
            process.kill()
            process.wait()

    def _start(self, kind: str, *options: str, **environment: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", "--scheduler-file", str(self.file), *options]
        log = open(self.folder / f"{kind}-{time.monotonic_ns()}.log", "wb")  # noqa: SIM115
        return subprocess.Popen(command, cwd=self.folder, env=ENVIRONMENT | environment, stdout=log, stderr=log)

    def _wait(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline, "\n".join(path.read_text() for path in self.folder.glob("*.log"))
            time.sleep(0.05)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """Two workers, neither in the folder that the tests run in."""
    machines = Machines(tmp_path_factory.mktemp("cluster") / "machines")
    try:
        machines.add_worker()
        machines.add_worker()
        yield machines
    finally:
        machines.stop()


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tasks for a small model, so that tensors are shared by several of them."""
    monkeypatch.setattr(cluster, "BATCH_WEIGHTS", 20_000)


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload]


def test_the_command_gives_the_same_bytes(machines: Machines, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "Tiny-1M")
    local = ("quantize", "Tiny-1M", "--recipe", "q4_k_m", "--quiet")  # a relative path; workers run elsewhere
    assert run(*local, "--out", "local.gguf", cwd=tmp_path).returncode == 0
    result = run(*local, "--out", "cluster.gguf", "--scheduler", machines.address, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert (tmp_path / "cluster.gguf").read_bytes() == (tmp_path / "local.gguf").read_bytes()


def mean_squares(tensors: tuple[Tensor, ...], path: Path) -> Path:
    """An importance matrix with other numbers for every column and expert."""
    random = np.random.default_rng(4)
    sums, counts = {}, {}
    for tensor in tensors:
        if len(tensor.shape) > 1 and tensor.layer is not None:
            n_expert = tensor.shape[0] if len(tensor.shape) == 3 else 1
            sums[tensor.name] = random.lognormal(0, 1, (n_expert, tensor.n_cols))
            counts[tensor.name] = np.full((n_expert, 1), 512.0)
    write_sums(ImportanceSums(sums, counts, 512, ("made up",)), path)
    return path


def test_a_worker_killed_in_the_middle_changes_nothing(machines: Machines, small_batches: None, tmp_path: Path) -> None:
    model = open_model(make_checkpoint(tmp_path / "moe", num_experts=moe_config()["num_experts"]))
    importance = read_importance(mean_squares(model.tensors, tmp_path / "imatrix.gguf"))
    planned = plan(model, open_recipe("q4_k_m"), importance)
    assert any(array.ndim == 2 for array in planned.importance.values())
    write(planned, tmp_path / "local.gguf")
    victim, written, busy = machines.add_worker(), [0], list[int]()

    def kill() -> None:
        with machines.client() as client:
            busy.append(len(client.processing()[victim]))
        machines.workers[victim].kill()

    def advance(nbytes: int) -> None:
        written[0] += nbytes
        if not busy and killer.ident is None:
            machines.workers[victim].send_signal(signal.SIGSTOP)  # so that it has work when it dies
            killer.start()

    killer = threading.Timer(1.0, kill)
    with cluster.open_cluster(machines.address) as encode:
        write(planned, tmp_path / "cluster.gguf", on_bytes=advance, run=encode)
    killer.join()
    machines.workers.pop(victim).wait()
    assert busy[0] > 0
    assert (tmp_path / "cluster.gguf").read_bytes() == (tmp_path / "local.gguf").read_bytes()
    assert written[0] == sum(item.nbytes for item in planned.tensors)


def test_weights_from_a_hub_and_no_token_to_the_workers(machines: Machines, checkpoint: Path, tmp_path: Path) -> None:
    expected = tmp_path / "local.gguf"
    write(plan(open_model(checkpoint), open_recipe("q4_0")), expected)
    with serving({"org/Tiny-1M": checkpoint}) as hub:
        environment = ENVIRONMENT | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
        command = ("quantize", "org/Tiny-1M", "--recipe", "q4_0", "--quiet", "--scheduler", machines.address, "--out")
        result = run(*command, tmp_path / "hub.gguf", env=environment)
        assert (result.returncode, result.stderr) == (0, "")
        assert (tmp_path / "hub.gguf").read_bytes() == expected.read_bytes()
        size = (checkpoint / "model.safetensors").stat().st_size
        assert hub.served["model.safetensors"] < 1.5 * size
        hub.gated.add("org/Tiny-1M")  # the client's token opens it, the workers have none
        result = run(*command, tmp_path / "gated.gguf", env=environment)
        assert result.returncode == 2
        assert "error: worker tcp://127.0.0.1:" in result.stderr
        assert "hf://org/Tiny-1M" in result.stderr
        assert TOKEN not in result.stderr
        assert not (tmp_path / "gated.gguf").exists()


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="a path that differs between processes: /proc/self/cwd")
def test_a_source_that_workers_do_not_see_or_see_another_of(
    machines: Machines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weights_for(text_config())
    make_checkpoint(tmp_path / "elsewhere", weights=weights)
    monkeypatch.chdir(tmp_path)
    path = Path("/proc/self/cwd/elsewhere")
    planned = plan(open_model(path), open_recipe("q8_0"))
    with cluster.open_cluster(machines.address) as encode:
        with pytest.raises(SourceError, match=r"worker tcp://\S+: /proc/self/cwd/elsewhere/model.safetensors: cannot"):
            write(planned, tmp_path / "out.gguf", run=encode)
        weights["model.layers.2.mlp.up_proj.weight"] *= 1.5
        make_checkpoint(machines.folder / "elsewhere", weights=weights)
        with pytest.raises(SourceError, match=r"worker tcp://\S+: \S+model.safetensors: another file"):
            write(planned, tmp_path / "out.gguf", run=encode)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("is_moe", [False, True])
def test_rounding_by_statistics_gives_the_same_bytes(machines: Machines, is_moe: bool, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "c", **({"num_experts": moe_config()["num_experts"]} if is_moe else {}))
    make_statistics(
        open_model(source),
        tmp_path / "made.stats",
        outputs=["blk.1.ffn_down_exps.weight" if is_moe else "blk.1.ffn_up.weight", "embed/output"],
        unseen=[("blk.0.ffn_up_exps.weight", 3)],
        n_group=3,
    )
    local = ("quantize", "c", "--recipe", "q4_k_m", "--keep-types", "--stats", "made.stats", "--quiet")
    plain = run(*local, "--rounding", "none", "--out", "plain.gguf", cwd=tmp_path)
    assert (plain.returncode, plain.stderr) == (0, "")
    assert run(*local, "--out", "local.gguf", cwd=tmp_path).returncode == 0
    result = run(*local, "--out", "cluster.gguf", "--scheduler", machines.address, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert (tmp_path / "cluster.gguf").read_bytes() == (tmp_path / "local.gguf").read_bytes()
    assert (tmp_path / "cluster.gguf").read_bytes()[-1000:] != (tmp_path / "plain.gguf").read_bytes()[-1000:]


def test_a_sweep_by_statistics_keeps_the_same_files(machines: Machines, tmp_path: Path) -> None:
    make_statistics(open_model(checkpoint_dir()), tmp_path / "made.stats", n_group=3)
    words = ("sweep", str(checkpoint_dir()), "-r", "q4_0", "--stats", "made.stats", "--context", "64", "--chunks", "2")
    for out, where in (("local", ()), ("cluster", ("--scheduler", machines.address))):
        result = run(*words, "--imatrix", "none", "--out", out, "--quiet", *where, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    [local], [far] = (list((tmp_path / out).glob("*.gguf")) for out in ("local", "cluster"))
    assert (local.name, local.read_bytes()) == (far.name, far.read_bytes())


def test_whole_matrices_are_one_piece_in_small_batches(
    machines: Machines, small_batches: None, checkpoint: Path, tmp_path: Path
) -> None:
    model = open_model(checkpoint)
    path = make_statistics(model, tmp_path / "made.stats", outputs=["blk.2.ffn_up.weight"], n_group=2)
    planned = with_rounding(plan(model, open_recipe("q4_0")), open_statistics(path))
    write(planned, tmp_path / "local.gguf")
    with cluster.open_cluster(machines.address) as encode:
        write(planned, tmp_path / "cluster.gguf", run=encode)
    assert (tmp_path / "cluster.gguf").read_bytes() == (tmp_path / "local.gguf").read_bytes()


def test_a_way_of_rounding_that_cannot_be_sent_is_said(machines: Machines, checkpoint: Path, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Zeros:  # of no module, so that no worker could find it
        whole: bool = False

        def encode(self, tensor: Tensor, start: int, stop: int, quant_format: QuantFormat) -> U8Array:
            return np.zeros((stop - start, quant_format.row_bytes(tensor.n_cols)), np.uint8)

    planned = replace(plan(open_model(checkpoint), open_recipe("q8_0")), rounding={"blk.0.ffn_up.weight": Zeros()})
    with cluster.open_cluster(machines.address) as encode, pytest.raises(ClusterError, match=r"blk\.0\.ffn_up\.weight"):
        write(planned, tmp_path / "out.gguf", run=encode)
    assert not (tmp_path / "out.gguf").exists()


def test_errors_of_workers_are_those_of_a_local_run(machines: Machines, tmp_path: Path) -> None:
    weights = weights_for(text_config())
    weights["model.layers.1.mlp.up_proj.weight"][7, 7] = np.inf
    folder = make_checkpoint(tmp_path / "broken", weights=weights)
    result = run("convert", folder, "--out", tmp_path / "out.gguf", "--quiet", "--scheduler", machines.address)
    assert result.returncode == 2
    assert "layers.1.mlp.up_proj.weight rows 0 to 511: non-finite weight" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_workers_with_another_pocketquant_are_refused_by_name(machines: Machines, tmp_path: Path) -> None:
    package = Path(pocketquant.__file__).parent
    shutil.copytree(package, tmp_path / "changed/pocketquant", ignore=shutil.ignore_patterns("__pycache__", "*.nb?"))
    with open(tmp_path / "changed/pocketquant/gguf_file/writing.py", "a") as file:
        file.write("# another one\n")
    (tmp_path / "none/pocketquant").mkdir(parents=True)
    (tmp_path / "none/pocketquant/__init__.py").write_text("raise ImportError\n")
    changed = machines.add_worker(PYTHONPATH=str(tmp_path / "changed"))
    none = machines.add_worker(PYTHONPATH=str(tmp_path / "none"))
    try:
        with pytest.raises(ClusterError) as caught, cluster.open_cluster(machines.address):
            pass
        assert f"{changed}: pocketquant {pocketquant.__version__} (sources " in str(caught.value)
        assert f"{none}: no pocketquant" in str(caught.value)
        assert "2 of 4 workers" in str(caught.value)
    finally:
        machines.kill_worker(changed)
        machines.kill_worker(none)


def test_an_interrupt_cancels_what_is_under_way(machines: Machines, tmp_path: Path) -> None:
    wide = make_sparse_checkpoint(tmp_path / "wide", text_config(vocab_size=400_000), prefix="model.")
    (tmp_path / "out.gguf").write_bytes(b"good")
    command = [COMMAND, "quantize", str(wide), "--recipe", "q4_k_m", "--quiet", "--scheduler", machines.address]
    process = subprocess.Popen([*command, "--out", str(tmp_path / "out.gguf")], stderr=subprocess.PIPE, text=True)
    try:
        while not list(tmp_path.glob(".out.gguf.*")):
            assert process.poll() is None
            time.sleep(0.01)
        machines.signal_workers(signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        _, talk = process.communicate(timeout=30)
    finally:
        machines.signal_workers(signal.SIGCONT)
        process.kill()
    assert process.returncode == 130, talk
    assert "interrupted; nothing was replaced" in talk
    assert (tmp_path / "out.gguf").read_bytes() == b"good"
    assert not list(tmp_path.glob(".out.gguf.*"))
    with machines.client() as client:
        machines._wait(lambda: not any(client.processing().values()))


def test_no_cluster_there(checkpoint: Path, tmp_path: Path) -> None:
    started, address = time.monotonic(), "dask://127.0.0.1:9"
    result = run("convert", checkpoint, "--out", tmp_path / "out.gguf", "--quiet", "--scheduler", address)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {address}: no Dask scheduler answers there within 5 s; start one with")
    assert "Traceback" not in result.stderr
    assert time.monotonic() - started < 20
    assert not (tmp_path / "out.gguf").exists()


def test_no_such_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 1.0)
    with pytest.raises(ClusterError, match="no Dask scheduler"), cluster.open_cluster("dask://no-such-host.invalid:1"):
        pass


def test_a_scheduler_without_workers_and_one_that_dies(
    checkpoint: Path, small_batches: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 2.0)
    machines = Machines(tmp_path / "machines")
    try:
        with (
            pytest.raises(ClusterError, match="has no workers; start some: `dask worker 127"),
            cluster.open_cluster(machines.address),
        ):
            pass
        machines.add_worker()
        scheduler = machines.scheduler
        assert scheduler is not None
        planned = plan(open_model(checkpoint), open_recipe("q8_0"))
        with cluster.open_cluster(machines.address) as encode, pytest.raises(ClusterError, match="scheduler is gone"):
            write(planned, tmp_path / "out.gguf", on_bytes=lambda nbytes: scheduler.kill(), run=encode)
    finally:
        machines.stop()
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:8786", "dask://127.0.0.1", "127.0.0.1:8786", "dask://a b:1"])
def test_no_address_of_a_cluster(address: str) -> None:
    with pytest.raises(ClusterError, match="give dask://HOST:PORT"), cluster.open_cluster(address):
        pass


def test_without_dask_the_extra_is_named(checkpoint: Path, tmp_path: Path) -> None:
    code = "import sys; sys.modules['distributed'] = None; from pocketquant.cli import main; main()"
    command = [sys.executable, "-c", code, "convert", str(checkpoint), "--out", str(tmp_path / "out.gguf"), "--quiet"]
    result = subprocess.run([*command, "--scheduler", "dask://127.0.0.1:8786"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "pip install 'dask[distributed]>=" in result.stderr
