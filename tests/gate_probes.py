"""A golden ELMER checkpoint with probes of its own, and what they say in plain PyTorch."""

import math
import shutil

import torch
from safetensors.torch import load_file

from multiexit_engine import Engine
from multiexit_engine.checkpoint.probes import GATE_PROBES
from multiexit_engine.train import train_gates
from tests.golden.test_elmer_golden import FOLDER


def random_sources(count, seed):
    draw = torch.Generator().manual_seed(seed)
    lens = torch.randint(1, 25, (count,), generator=draw).tolist()
    return [torch.randint(3, 399, (n,), generator=draw).tolist() for n in lens]


def save_probed_elmer(folder):
    """The golden checkpoint in a new folder, with probes that learned a little."""
    shutil.copytree(FOLDER / "t1", folder)
    engine = Engine.from_pretrained(folder, dtype="float32")
    train_gates(engine, random_sources(60, seed=3), units=8, epochs=30, learning_rate=1e-2)
    return folder


def plain_chances(folder, layer, normed, mode):
    """[rows] that each of [rows, hidden] states passes the threshold of a mode."""
    probe = {
        name: part.double() for name, part in load_file(folder / GATE_PROBES.file_name).items()
    }
    inner = torch.relu(normed.double() @ probe[f"{layer}.up"].T + probe[f"{layer}.up_bias"])
    out = inner @ probe[f"{layer}.down"].T + probe[f"{layer}.down_bias"]
    if mode.measure == "entropy":
        return torch.sigmoid((math.log(mode.threshold) - out[:, 1]) / out[:, 3].exp())
    odds = math.log(mode.threshold / (1 - mode.threshold))
    return torch.sigmoid((out[:, 0] - odds) / out[:, 2].exp())
