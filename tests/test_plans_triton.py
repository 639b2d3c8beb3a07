"""Launches by a plan, past Triton's JIT: they pass to the launcher what the JIT would. Over a stub of libcuda."""

import pytest
import stub_process


@pytest.mark.parametrize("seed", [0, 1])
def test_a_planned_launch_passes_what_the_jit_would_whatever_changed_before_it(libcuda, seed):
    compared, planned = map(int, stub_process.run("planned_launches.py", libcuda, seed, 4).split())
    assert compared > 60
    # pointers that are no multiples of 16, and rows that are copied, go through the JIT every time
    assert planned > compared // 2


def test_a_weight_of_a_size_seen_before_is_dequantized_past_the_jit(libcuda):
    stub_process.run("dequantized_launches.py", libcuda)


def test_a_backward_like_one_before_goes_straight_to_the_kernels_and_no_other_does(libcuda):
    stub_process.run("planned_backwards.py", libcuda)


@pytest.mark.parametrize(("what", "why"), [("launcher", "other arguments"), ("descriptors", "tensor descriptors")])
def test_a_launcher_of_another_kind_is_called_through_the_jit_and_a_warning_says_so_once(libcuda, what, why):
    warned, info = stub_process.run("unknown_launcher.py", libcuda, what).splitlines()
    assert "every launch goes through Triton's JIT" in warned
    assert why in warned
    # launches without descriptors go straight
    assert why in info if what == "launcher" else info == "None"
