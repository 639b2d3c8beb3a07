"""Serve two adapters in turn over one base model: every request names its adapter, the base is in memory once.

A small network learns real handwritten digits (scikit-learn's). It fails on digits that stand upside down and on
mirrored ones; for each kind an adapter is trained and saved. Then a server, which has the plain network and the two
folders, answers a mixed stream of requests, switching adapters between them.

    python examples/serve_adapters.py [--steps 300] [--out adapters]
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

from fused_lora import apply_lora, load_adapter, lora_parameters, save_adapter, set_adapter

BATCH = 64
KINDS = {
    "upright": lambda x: x,
    "upside-down": lambda x: x.flip(-1),
    "mirrored": lambda x: x.view(-1, 8, 8).flip(-1).flatten(1),
}
ADAPTER_OF = {"upright": None, "upside-down": "upside-down", "mirrored": "mirrored"}


def make_net():
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def train(net, parameters, x, labels, steps, title):
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for _ in tqdm(range(steps), title):
        rows = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(net(x[rows]), labels[rows]).backward()
        optimizer.step()


class Server:
    """One network, its adapters, and an answer for a request: (adapter or None, images (B, 64)) -> digits (B,)."""

    def __init__(self, net, folders):
        self.net = net
        for name, folder in folders.items():
            load_adapter(net, folder, name)
        net.eval()

    @torch.inference_mode()
    def answer(self, adapter, images):
        set_adapter(self.net, adapter)
        return self.net(images).argmax(1)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="of each training")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("adapters"), help="folder for the adapters")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    digits = load_digits()
    images = torch.tensor(digits.data / 16.0, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    x, y, unseen_x, unseen_y = images[:1400], labels[:1400], images[1400:], labels[1400:]

    net = make_net()
    train(net, net.parameters(), x, y, options.steps, "base")
    state = {name: value.clone() for name, value in net.state_dict().items()}
    for kind in ("upside-down", "mirrored"):
        tuned = make_net()
        tuned.load_state_dict(state)
        apply_lora(tuned, rank=8, adapter=kind)
        train(tuned, lora_parameters(tuned), KINDS[kind](x), y, options.steps, kind)
        save_adapter(tuned, options.out / kind, kind)

    net = make_net()
    net.load_state_dict(state)
    server = Server(net, {kind: options.out / kind for kind in ("upside-down", "mirrored")})
    rows = torch.randint(len(unseen_x), (options.requests, 8))
    right = {(kind, who): 0 for kind in KINDS for who in ("base", "adapter")}
    start = time.perf_counter()
    for request, row in enumerate(rows):
        kind = list(KINDS)[request % len(KINDS)]
        digits_of = KINDS[kind](unseen_x[row])
        right[kind, "adapter"] += (server.answer(ADAPTER_OF[kind], digits_of) == unseen_y[row]).sum().item()
        right[kind, "base"] += (server.answer(None, digits_of) == unseen_y[row]).sum().item()
    each = (time.perf_counter() - start) / (2 * options.requests)

    asked = {kind: 8 * len(range(number, options.requests, len(KINDS))) for number, kind in enumerate(KINDS)}
    accuracy = {(kind, who): count / asked[kind] for (kind, who), count in right.items()}
    print(f"{'digits':<12} {'base':>6} {'its adapter':>12}")
    for kind in KINDS:
        print(f"{kind:<12} {accuracy[kind, 'base']:>6.1%} {accuracy[kind, 'adapter']:>12.1%}")
    unchanged = all(torch.equal(value, net.state_dict()[name]) for name, value in state.items())
    sizes = {
        kind: sum(file.stat().st_size for file in (options.out / kind).iterdir())
        for kind in ADAPTER_OF.values()
        if kind
    }
    print(f"{1e3 * each:.2f} ms an answer, switching included; base weights {'unchanged' if unchanged else 'CHANGED'}")
    print(f"base {sum(p.nbytes for p in make_net().parameters()):,} bytes, adapters on disk {sizes}")
    return {"accuracy": accuracy, "unchanged": unchanged}


if __name__ == "__main__":
    main()
