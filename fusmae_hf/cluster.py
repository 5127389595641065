"""Work on several machines, by Ray: the functions that one machine calls, as tasks on the nodes of a cluster."""

import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusmae_hf import __version__
from fusmae_hf.errors import USER_ERRORS

TRIES = 4
"""So often is a task tried that fails for a reason that another try, elsewhere, may not have."""

_NODE_ANSWERS_WITHIN = 180
"""Seconds: a node imports the package first."""


def require_ray() -> Any:
    """The module `ray`.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError(
            "--engine ray needs Ray, here and on every node: `pip install 'fusmae_hf[cluster]'`."
        ) from error
    return ray


@contextmanager
def connected(address: str | None) -> Iterator[Any]:
    """The module `ray`, connected to a cluster until the end of the block.

    Args:
        address: `"auto"`, host and port of a cluster, or `ray://...`; None starts one on this machine, unless the
            environment variable RAY_ADDRESS names another.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: there is no cluster at the address.
    """
    ray = require_ray()
    if ray.is_initialized():  # the caller's own
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local = address is None and not os.environ.get("RAY_ADDRESS")
    try:
        ray.init(
            address, log_to_driver=False, logging_level="ERROR", **({"include_dashboard": False} if local else {})
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConnectionError(
            f"There is no Ray cluster at {address or 'this machine'} ({error}). Start one with `ray start --head`, "
            "and give what it prints: --ray-address HOST:PORT."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def require_same_everywhere(ray: Any, folder: Path, look: Callable[[], Any]) -> None:
    """Make sure that each node sees the folder for the results and reads the same, before any work.

    Args:
        ray: as `connected` gives it.
        folder: for the results.
        look: says what a node reads; what it raises or gives is compared with what this process gets.

    Raises:
        OSError: a node does not see the folder, or reads something else.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    folder.mkdir(parents=True, exist_ok=True)
    sign = folder / f".seen.{secrets.token_hex(4)}.incomplete"
    here = _look_around(str(folder), None, look)
    try:
        sign.touch()
        task = ray.remote(num_cpus=0, max_retries=0)(_look_around)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        answers = [
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                str(folder), sign.name, look
            )
            for node in nodes
        ]
        for node, answer in zip(nodes, answers, strict=True):
            try:
                seen, version, found = ray.get(answer, timeout=_NODE_ANSWERS_WITHIN)
            except ray.exceptions.RayError as error:
                raise OSError(
                    f"Node {node['NodeManagerAddress']} cannot work ({str(error).splitlines()[-1]}). Is fusmae_hf "
                    "installed there?"
                ) from error
            where = f"Node {node['NodeManagerAddress']}"
            if version != __version__:
                raise OSError(
                    f"{where} has fusmae_hf {version}, this machine {__version__}: install the same everywhere."
                )
            if not seen:
                raise OSError(
                    f"{where} does not see {folder}, or not what this machine writes there. Give a folder that all "
                    "nodes share, under the same name."
                )
            if found != here[2]:
                raise OSError(f"{where} does not read what this machine does: {found} there, {here[2]} here.")
    finally:
        sign.unlink(missing_ok=True)


def _look_around(folder: str, sign: str | None, look: Callable[[], Any]) -> tuple[bool, str, Any]:
    try:
        found = look()
    except USER_ERRORS as error:
        found = str(error)
    return sign is not None and Path(folder, sign).is_file(), __version__, found


def _called(function: Callable[[Any], Any], item: Any) -> Any:
    return function(item)


def run_tasks(
    ray: Any, function: Callable[[Any], Any], items: Iterable[Any], in_flight: int, cpus: int = 1, gpus: int = 0
) -> Iterator[Any]:
    """Call a function for each item, as tasks, and give the results as they come.

    A task whose node dies, or that raises an `OSError` or runs out of memory, is tried again. Another error of a
    task is raised, and the others are cancelled.

    Args:
        ray: as `connected` gives it.
        function: can be pickled; may be called twice for one item.
        items: can be pickled.
        in_flight: most tasks that wait or run at a time.
        cpus, gpus: that a task takes.
    """
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=TRIES - 1, retry_exceptions=[OSError, MemoryError])(
        _called
    )
    shared = ray.put(function)
    rest, running = iter(items), list[Any]()
    try:
        while True:
            while len(running) < in_flight and (item := next(rest, None)) is not None:
                running.append(task.remote(shared, item))
            if not running:
                return
            done, running = ray.wait(running)
            for result in done:
                try:
                    yield ray.get(result)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                except ray.exceptions.RayError as error:
                    raise ChildProcessError(
                        f"A task ended without a word {TRIES} times ({str(error).splitlines()[0]}). What is "
                        "finished is kept: run the same command again to go on."
                    ) from error
    finally:
        for unfinished in running:
            ray.cancel(unfinished, force=True)
