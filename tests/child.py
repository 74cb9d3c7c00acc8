# SPDX-FileCopyrightText: 2026 the contributors
# SPDX-License-Identifier: Apache-2.0
"""A command of the project in a process of its own that starts in no time.

Importing torch and the libraries takes seconds. A fork server does it once, and each child is a
fork of it. The child runs what `python smpo.py ...` runs, `common.run_script(smpo.main)`, and can
be killed, stopped or starved like any process."""

import importlib
import multiprocessing
import os
import signal
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

# What the scripts import when they start, most of it lazily.
PRELOAD = [
    "torch",
    "torch._dynamo",  # the optimizers import it at their first step, which takes seconds
    "datasets",
    "transformers.models.clip.modeling_clip",
    "transformers.models.auto",
    "transformers.models.clip.image_processing_pil_clip",
    "transformers.hf_argparser",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.schedulers.scheduling_ddpm",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "common",
    "smpo",
    "dro",
    "dpo_baseline",
    "eval",
]
ROOT = Path(__file__).parent.parent
# The server's path
os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOAD)


def run_in_child(name, flags, log, kill_at, limit, ignore_interrupt, environment):
    os.setsid()
    os.chdir(
        Path(log).parent
    )  # the server's working folder is the one that the tests were started in
    signal.signal(signal.SIGINT, signal.SIG_IGN if ignore_interrupt else signal.default_int_handler)
    os.umask(int(environment.pop("UMASK", "0022"), 8))
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", buffering=1)
    sys.stderr = open(2, "w", buffering=1)
    os.environ.update(environment)
    import torch

    import common

    torch.set_num_threads(1)
    if kill_at:
        sys.addaudithook(killer(*kill_at))
    if (
        limit
    ):  # a file that grows beyond it fails as on a full disk, with a real error of the system
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    common.run_script(lambda: importlib.import_module(name).main([str(flag) for flag in flags]))


def killer(event, pattern, count=1):
    """An audit hook that kills this process, as kill -9 does, just before the count-th event whose
    path (the new path of a rename) fits the pattern. Events: "append", the opening of a file to
    append to it, and what Python's audit table names, such as os.rename and os.remove. So a kill
    hits the same moment on every machine."""
    seen = 0

    def hook(name, arguments):
        nonlocal seen
        if name == "open" and arguments[1] == "a":
            name = "append"
        if name != event:
            return
        path = str(arguments[1] if name == "os.rename" else arguments[0])
        if fnmatch(path, pattern):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


class Child:
    """A running command: a script's name without .py, its flags, and the file for all that it says.

    kill_at: see `killer`; limit: the largest file that it may write, in bytes; ignore_interrupt:
    start with SIGINT ignored, as after a shell's "&" without job control; environment: more
    variables, and UMASK, in octal."""

    started = []

    def __init__(
        self, name, flags, log, kill_at=None, limit=0, ignore_interrupt=False, **environment
    ):
        self.log = Path(log)
        self.log.unlink(missing_ok=True)
        words = (name, list(flags), str(log), kill_at, limit, ignore_interrupt, environment)
        self.process = context.Process(target=run_in_child, args=words)
        self.process.start()
        Child.started.append(self)

    @classmethod
    def kill_all(cls):
        """End what a failed test has left behind: halted processes would wait for ever."""
        for child in cls.started:
            if child.process.is_alive():
                child.process.kill()
                child.process.join()
        cls.started.clear()

    def wait(self, timeout=120):
        """The exit code; minus the signal's number where one killed it."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.send(signal.SIGKILL, group=True)
            raise TimeoutError(self.output[-3000:])
        return self.process.exitcode

    def send(self, number, group=False):
        (os.killpg if group else os.kill)(self.process.pid, number)

    def stop_when(self, reached, timeout=120):
        """Halt it (SIGSTOP) once reached() holds, and surely while it holds. False where the
        process ended before it was caught at that moment."""
        end = time.monotonic() + timeout
        while self.process.is_alive() and time.monotonic() < end:
            if reached():
                self.send(signal.SIGSTOP)
                time.sleep(0.002)  # until it stands still
                if reached():
                    return True
                self.send(signal.SIGCONT)
            time.sleep(0.0005)
        return False

    def send_when(self, reached, number=signal.SIGKILL, group=False, timeout=120):
        """Send a signal while reached() holds. Returns the exit code; 0 where the process ended
        before."""
        if self.stop_when(reached, timeout):
            self.send(number, group)
            self.send(signal.SIGCONT)
        return self.wait(timeout)

    @property
    def output(self):
        return self.log.read_text() if self.log.exists() else ""

    @property
    def error(self):
        """The last line it said."""
        return self.output.strip().split("\n")[-1].split("\r")[-1]
