"""A process of threads that launch at once, over the stub of libcuda: ``python threaded_launches.py FOLDER THREADS``.

What reaches Triton's launcher on each thread is held to what one thread alone passes it. So few plans are kept that
threads give up each other's, and one thread forgets all of them again and again.
"""

import random
import sys
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import triton
from planned_launches import draw, forward, plain, step

from fused_lora import plans
from fused_lora.backends.triton import launch, straight, workspace
from fused_lora.bench.host import stub

CALLS, ROUNDS, MOST = 5, 60, 4


# start of a tensor of the workspace -> the threads whose launches use it
USERS: defaultdict[int, set[int]] = defaultdict(set)


class Launches(threading.local):
    """Those of this thread."""

    def __init__(self):
        self.every, self.jit = [], 0

    @classmethod
    def watched(cls):
        here = cls()
        launcher = triton.runtime.driver.active.launcher_cls
        launched, through_jit = launcher.__call__, straight.Launch.through_jit

        def record(made, *args):
            here.every.append(args)
            addresses = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args[9:]]
            addresses = [address for address in addresses if type(address) is int]
            kinds = workspace._counters.values(), workspace._scratch.values(), workspace._outgrown
            for start, size in [(tensor.data_ptr(), tensor.nbytes) for kind in kinds for tensor in list(kind)]:
                if any(start <= address < start + size for address in addresses):
                    USERS[start].add(threading.get_ident())
            return launched(made, *args)

        def count(made, device):
            here.jit += 1
            return through_jit(made, device)

        launcher.__call__, straight.Launch.through_jit = record, count
        return here

    def of(self, call):
        """What a call passes, as comparable values; how many launches went by a plan; what it returned."""
        self.every, self.jit = [], 0
        work, operands = call
        names = {tensor.data_ptr(): number for number, tensor in enumerate(t for t in operands if torch.is_tensor(t))}
        kept = work(operands)
        return [plain(args, names) for args in self.every], len(self.every) - self.jit, kept


def main():
    stub.install(Path(sys.argv[1]))
    torch.set_num_threads(1)
    here, rng = Launches.watched(), random.Random(0)
    drawn = [draw(rng) for _ in range(CALLS)]
    # calls of one plan, told apart by their scale
    drawn += [[*operands[:5], 2 * operands[5], operands[6]] for operands in drawn]
    calls = [(work, operands) for operands in drawn for work in (forward, step)]
    # compiled, and what one thread passes
    expected = [here.of(call)[0] for call in calls]
    launch.forget_plans()
    for cache in (launch._matmul_plans, launch._adapter_grad_plans, plans.CALLS):
        cache._most = MOST
    start, threads = threading.Barrier(int(sys.argv[2])), int(sys.argv[2])
    USERS.clear()

    def work(number):
        mine, launched, planned = random.Random(number), 0, 0
        start.wait()
        for turn in range(ROUNDS):
            index = mine.randrange(len(calls))
            for _ in range(3):
                got, by_plan, _ = here.of(calls[index])
                assert got == expected[index], (got, expected[index])
                launched, planned = launched + len(got), planned + by_plan
            if number == 0 and turn % 20 == 19:
                launch.forget_plans()
        return launched, planned

    sys.setswitchinterval(1e-6)
    with ThreadPoolExecutor(threads) as pool:
        counts = list(pool.map(work, range(threads)))
    assert all(len(cache) <= MOST for cache in (launch._matmul_plans, launch._adapter_grad_plans, plans.CALLS))
    # a thread of a CPU is a stream: none shares its memory, and the pool's threads are alive until its end
    assert USERS
    assert all(len(users) == 1 for users in USERS.values())
    print(*map(sum, zip(*counts, strict=True)))


if __name__ == "__main__":
    main()
