"""The faults, one function each: (victims, n) -> outcomes."""

import collections
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator

from longctx_jax.faults import injections
from longctx_jax.faults.victims import (
    FIELDS,
    MODELS,
    Outcome,
    Victims,
    error_of,
    final_state,
    is_saving,
    steps,
    wait_until_training,
    was_refused,
    write_text,
)

FINAL_STEPS = 3  # after the last kill, to the end
MAX_DELAY_S = 1.0  # from the first step to the kill
DECAY = MODELS["decay"]
MEMORY_STEPS = 10_000


def kills(victims: Victims, n: int) -> Iterator[Outcome]:
    """SIGKILL at random moments, a quarter of them for each model; each run ends as if nothing."""
    for name in MODELS:
        yield _signals(victims, name, -(-n // len(MODELS)), signal.SIGKILL)


def terminations(victims: Victims, n: int) -> list[Outcome]:
    """SIGTERM at random moments: save, exit 0, resume."""
    return [_signals(victims, "vq", max(1, n // 10), signal.SIGTERM)]


def _signals(victims: Victims, name: str, n: int, number: signal.Signals) -> Outcome:
    outcome = Outcome(number.name, f"model {name}", n=n)
    chance = random.Random(f"{victims.seed} {name} {number}")
    workdir = victims.folder / f"{number.name}-{name}"
    endless = {**MODELS[name], "train.n_steps": 1_000_000}
    n_saving = n_done = 0
    while n_done < n:
        before = steps(workdir)
        victim = victims.start(workdir, endless)
        wait_until_training(victim)
        time.sleep(chance.uniform(0, MAX_DELAY_S))
        n_saving += is_saving(workdir)
        newest = (steps(workdir) or [0])[-1]
        victim.kill(number)
        code = victim.wait()
        n_done += 1
        fell_back = "falling back" in victim.text() or "is damaged" in victim.text()
        resumed = not before or f"resuming at step {before[-1]}" in victim.text()
        outcome.n_lost += fell_back + (not resumed) + ((steps(workdir) or [0])[-1] < newest)
        wanted = -number if number == signal.SIGKILL else 0
        outcome.n_survived += code == wanted
    last = (steps(workdir) or [0])[-1] + FINAL_STEPS
    fields = {**MODELS[name], "train.n_steps": last}
    is_same = _ends_as(victims, workdir, fields)
    if not is_same:
        outcome.n_survived = 0
    outcome.note = (
        f"{n_saving} while a save was under way; state after {last} steps "
        f"{'equals' if is_same else 'DIFFERS FROM'} that of an undisturbed run, bit for bit"
    )
    return outcome


def _ends_as(victims: Victims, workdir: pathlib.Path, fields, **options) -> bool:
    """Runs to the end; whether the state is that of an undisturbed run."""
    victim = victims.finish(workdir, fields, **options)
    return victim.exit_code == 0 and final_state(workdir) == victims.undisturbed(fields, **options)


def damages(victims: Victims, n: int) -> list[Outcome]:
    """Every kind of file of the newest checkpoint: a bit flipped, cut in half, gone."""
    base = victims.folder / "whole"
    fields = {**MODELS["vq"], "train.n_steps": 6}
    longer = fields | {"train.n_steps": 8}
    victims.finish(base, fields)
    expected = victims.undisturbed(longer)
    newest = base / "checkpoints" / str(steps(base)[-1])
    kinds: dict[str, str] = {}
    for path in sorted(p for p in newest.rglob("*") if p.is_file()):
        name = path.relative_to(newest).as_posix()
        kinds.setdefault(re.sub(r"[0-9a-f]{16,}", "*", name), name)
    by_how = {how: Outcome(f"checkpoint file {how}", "") for how in injections.DAMAGES}
    for kind, name in kinds.items():
        for how, damage in injections.DAMAGES.items():
            outcome = by_how[how]
            workdir = victims.folder / f"damaged-{how}-{kind.replace('/', '-').replace('*', 'x')}"
            shutil.copytree(base, workdir)
            damage(workdir / "checkpoints" / newest.name / name)
            victim = victims.finish(workdir, longer)
            is_same = victim.exit_code == 0 and final_state(workdir) == expected
            refused = was_refused(victim)
            outcome.n_survived += is_same
            outcome.n_refused += refused
            if not (is_same or refused):
                outcome.note += f"{kind}: {error_of(victim)}; "
    for outcome in by_how.values():
        outcome.n = len(kinds)
        outcome.detail = f"each of {len(kinds)} kinds"
    return list(by_how.values())


def disks(victims: Victims, n: int) -> list[Outcome]:
    """A disk that is full, then one that cannot be written, then neither."""
    disk = victims.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1100k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        return [Outcome("full disk", "not tried: mounting needs root", n=0)]
    fields = {**DECAY, "train.n_steps": 40, "train.keep_every": 2}
    try:
        return [
            _disk(victims, disk, "full disk", fields, (), "size=64m"),
            _disk(victims, disk, "read-only disk", fields, ("ro",), "rw"),
        ]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)


def _disk(victims: Victims, disk: pathlib.Path, fault: str, fields, harm, heal) -> Outcome:
    workdir = disk / fault.replace(" ", "-")
    outcome = Outcome(fault, "then mended")
    if harm:
        victims.finish(workdir, {**fields, "train.n_steps": 4})
    for option in harm:
        _remount(disk, option)
    victim = victims.finish(workdir, fields)
    refused, saved = was_refused(victim), steps(workdir)
    outcome.note = error_of(victim)
    _remount(disk, heal)
    is_same = _ends_as(victims, workdir, fields)
    outcome.n_lost = len(set(saved) - set(steps(workdir)))
    outcome.n_refused = int(refused and is_same)
    shutil.rmtree(workdir)
    return outcome


def _remount(disk: pathlib.Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(disk)], check=True)


def numbers(victims: Victims, n: int) -> list[Outcome]:
    """A gradient that is not finite: nothing of it is saved."""
    workdir = victims.folder / "nan"
    fields = {**DECAY, "train.n_steps": 40, "train.checkpoint_every": 5}
    victim = victims.finish(workdir, fields, inject=injections.nan_at(12))
    outcome = Outcome("NaN gradient", "at step 12", note=error_of(victim))
    is_same = _ends_as(victims, workdir, fields)
    outcome.n_refused = int(was_refused(victim) and is_same)
    return [outcome]


def texts(victims: Victims, n: int) -> list[Outcome]:
    """A data file that changes, disappears, or is cut while it is read; then it is put back."""
    outcomes = []
    for fault in ("changes", "disappears", "is cut short while read"):
        workdir = victims.folder / f"text-{fault.replace(' ', '-')}"
        text = victims.folder / f"{workdir.name}.txt"
        write_text(text)
        fields = {**DECAY, "data.files": (str(text),)}
        victims.finish(workdir, {**fields, "train.n_steps": 4})
        inject = None
        if fault == "changes":
            text.write_text(text.read_text().replace("memory", "remedy"))
        elif fault == "disappears":
            text.unlink()
        else:
            inject = injections.call_at(6, lambda text=text: os.truncate(text, 0))
        victim = victims.finish(workdir, fields, inject=inject)
        outcome = Outcome(f"data file {fault}", "then put back", note=error_of(victim))
        write_text(text)
        refused = was_refused(victim)
        is_same = _ends_as(victims, workdir, fields)
        outcome.n_refused = int(refused and is_same)
        outcome.n_survived = int(not refused and is_same)
        outcomes.append(outcome)
    return outcomes


def readers(victims: Victims, n: int) -> list[Outcome]:
    """A thread that reads data dies; another hangs until the watchdog ends the run."""
    outcomes = []
    for fault, inject, fields in (
        ("reader dies", injections.raise_at(5), {}),
        ("reader hangs", injections.hang_at(5), {"log.hang_timeout_s": 20, "log.hang_exit": True}),
    ):
        workdir = victims.folder / fault.replace(" ", "-")
        victim = victims.finish(workdir, {**DECAY, **fields}, inject=inject)
        hang = workdir / "hang.txt"
        note = "stacks in hang.txt" if hang.exists() and "hang" in hang.read_text() else ""
        outcome = Outcome(fault, "then started again", note=note or error_of(victim))
        is_same = _ends_as(victims, workdir, {**DECAY, **fields})
        outcome.n_survived = int(victim.exit_code != 0 and is_same)
        outcomes.append(outcome)
    return outcomes


def clocks(victims: Victims, n: int) -> list[Outcome]:
    """The wall clock jumps by up to a day, either way; saves may then run out of their time."""
    fields = {**DECAY, "train.n_steps": 20}
    workdir = victims.folder / "clock"
    victim = victims.finish(workdir, fields, inject=injections.jumping_clock((3, 6, 9, 12, 15)))
    ended = victim.exit_code == 0
    is_same = _ends_as(victims, workdir, fields)
    outcome = Outcome("clock jumps", "five times", note="" if ended else error_of(victim))
    outcome.n_survived = int(ended and is_same)
    outcome.n_refused = int(was_refused(victim) and is_same)
    return [outcome]


def duplicates(victims: Victims, n: int) -> list[Outcome]:
    """A second trainer in the folder of one that runs."""
    workdir = victims.folder / "duplicate"
    fields = {**DECAY, "train.n_steps": 100}
    first = victims.start(workdir, fields)
    wait_until_training(first)
    second = victims.finish(workdir, fields)
    first.wait()
    is_same = first.exit_code == 0 and final_state(workdir) == victims.undisturbed(fields)
    outcome = Outcome("duplicate run folder", "second of two", note=error_of(second))
    outcome.n_refused = int(was_refused(second) and is_same)
    return [outcome]


def partners(victims: Victims, n: int) -> list[Outcome]:
    """One of two processes of a run is killed: the other ends, and both go on later."""
    workdir = victims.folder / "partners"
    fields = {**DECAY, "model.n_heads": 4, "mesh.fsdp": "on"}

    def both(n_steps: int):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        return [
            victims.start(
                workdir,
                {**fields, "train.n_steps": n_steps},
                flags=(
                    f"--coordinator_address=localhost:{port}",
                    "--num_processes=2",
                    f"--process_id={i}",
                ),
                environment={"JAX_NUM_CPU_DEVICES": "2"},
            )
            for i in range(2)
        ]

    first, second = both(1_000_000)
    wait_until_training(first)
    time.sleep(3)
    second.kill(signal.SIGKILL)
    second.wait()
    start = time.monotonic()
    code = first.wait(timeout_s=200)
    seconds, saved = time.monotonic() - start, steps(workdir)
    n_steps = (saved or [0])[-1] + FINAL_STEPS
    codes = [victim.wait() for victim in both(n_steps)]
    went_on = codes == [0, 0] and steps(workdir)[-1] == n_steps
    outcome = Outcome("one of two processes dies", "FSDP over both", n_survived=int(went_on))
    outcome.n_lost = int(bool(saved) and not went_on)
    outcome.note = f"the other ended after {seconds:.0f} s (exit code {code}); went on from there"
    return [outcome]


def memory(victims: Victims, n: int) -> list[Outcome]:
    """Ten thousand steps: memory at the end against memory at the first thousand."""
    workdir = victims.folder / "long"
    fields = {
        **DECAY,
        "train.n_steps": MEMORY_STEPS,
        "train.checkpoint_every": 1_000,
        "log.every": 100,
    }
    victim = victims.start(workdir, fields)
    sizes: dict[int, int] = collections.OrderedDict()
    while victim.poll() is None:
        found = re.findall(r"step=(\d+)/", victim.text())
        step = int(found[-1]) if found else 0
        if step // 1000 not in sizes and step >= 1000:
            sizes[step // 1000] = _resident_bytes(victim.pid)
        time.sleep(0.1)
    first, last = (list(sizes.values()) or [0])[0], (list(sizes.values()) or [0])[-1]
    outcome = Outcome("10,000 steps", "memory stays", note=f"{first / 1e6:.0f} MB resident after ")
    outcome.note += f"1,000 steps, {last / 1e6:.0f} MB after {max(sizes, default=0)},000"
    outcome.n_survived = int(victim.exit_code == 0 and 0 < last < 1.1 * first)
    return [outcome]


def _resident_bytes(pid: int) -> int:
    try:
        text = pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    return int(found.group(1)) * 1024 if found else 0


FAULTS: dict[str, Callable[[Victims, int], Iterable[Outcome]]] = {
    "kills": kills,
    "terminations": terminations,
    "damages": damages,
    "disks": disks,
    "numbers": numbers,
    "texts": texts,
    "readers": readers,
    "clocks": clocks,
    "duplicates": duplicates,
    "partners": partners,
    "memory": memory,
}
assert FIELDS["train.keep_latest"] > 1  # a damaged checkpoint must have one before it
