"""A command of the project in a process of its own that starts in no time: importing torch and the libraries
takes seconds, so a fork server does it once and each child is a fork of that. The child runs what `python
smpo.py ...` runs, `common.launch(smpo.main)`, and can be killed, stopped or starved like any process."""

import importlib
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

# what the scripts import when they start, most of it lazily
PRELOAD = [
    "torch", "datasets", "transformers.models.clip.modeling_clip", "transformers.models.auto",
    "transformers.models.clip.image_processing_pil_clip", "transformers.hf_argparser",
    "diffusers.models.unets.unet_2d_condition", "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.schedulers.scheduling_ddpm", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "common", "smpo", "dro", "dpo_baseline", "eval",
]  # fmt: skip
ROOT = Path(__file__).parent.parent
os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"  # the server's path
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOAD)


def run_in_child(name, flags, log, part, limit, ignore, environment):
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN if ignore else signal.default_int_handler)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # a loader's workers: as without the fork server
    import torch

    import common

    torch.set_num_threads(1)
    common.PART = part
    if limit:  # a file that grows beyond it fails as on a full disk, with a real error of the system
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    common.launch(lambda: importlib.import_module(name).main([str(flag) for flag in flags]))


class Child:
    """A running command. part: common.PART, the rows of a part; limit: the largest file it may write; ignore:
    start with SIGINT ignored, as after a shell's "&" without job control (and as, else, the tests might)."""

    def __init__(self, name, flags, log, part=256, limit=0, ignore=False, **environment):
        self.log = Path(log)
        self.log.unlink(missing_ok=True)
        words = (name, list(flags), str(log), part, limit, ignore, environment)
        self.process = context.Process(target=run_in_child, args=words)
        self.process.start()

    def wait(self, timeout=120):
        """The exit code; minus the signal's number where one killed it."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.send(signal.SIGKILL, group=True)
            raise TimeoutError(self.log.read_text()[-3000:])
        return self.process.exitcode

    def send(self, number, group=False):
        (os.killpg if group else os.kill)(self.process.pid, number)

    def send_when(self, reached, number=signal.SIGKILL, group=False, timeout=120):
        """Send a signal once reached() holds, and surely while it holds. Returns the exit code; 0 where the
        process ended before it was caught at that moment."""
        end = time.monotonic() + timeout
        while self.process.is_alive() and time.monotonic() < end:
            if reached():
                self.send(signal.SIGSTOP)
                time.sleep(0.002)  # until it stands still
                held = reached()
                if held:
                    self.send(number, group)
                self.send(signal.SIGCONT)
                if held:
                    break
            time.sleep(0.0005)
        return self.wait(max(1, end - time.monotonic()))

    @property
    def output(self):
        return self.log.read_text()

    @property
    def error(self):
        """The last line it said."""
        return self.output.strip().split("\n")[-1].split("\r")[-1]
