"""Sampling: which images a step sees depends on seed and step alone."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ramslib.config import Config, check_shares
from ramslib.distributed import Processes
from ramslib.errors import InputError
from ramslib.training.optimization import (
    batch_keys,
    epoch_order,
    micro_batches,
    step_seed,
    steps_per_epoch,
    total_steps,
)

LABELS = torch.arange(11) % 3


@st.composite
def trainings(draw):
    """A configuration, labels of images and a number of processes that fit together."""
    world, grad_accum_steps, share = (draw(st.integers(1, 4)) for _ in range(3))
    config = Config(batch_size=world * grad_accum_steps * share, grad_accum_steps=grad_accum_steps)
    images = draw(st.integers(config.batch_size, 4 * config.batch_size + 5))
    labels = torch.tensor(draw(st.lists(st.integers(0, 6), min_size=images, max_size=images)))
    sampling = draw(st.sampled_from(["stratified", "random"]))
    return config.replace(seed=draw(st.integers(0, 99)), sampling=sampling), labels, world


@given(trainings())
@settings(max_examples=60, deadline=None)
def test_processes_and_micro_batches_share_the_batch_of_one(training):
    config, labels, world = training
    steps = range(2 * steps_per_epoch(config, len(labels)))
    shares = [
        list(micro_batches(config, labels, steps, Processes(rank, world))) for rank in range(world)
    ]
    assert {len(share) for share in shares} == {len(steps) * config.grad_accum_steps}
    assert {len(batch) for share in shares for batch in share} == {
        config.batch_size // config.grad_accum_steps // world
    }
    for step in steps:
        own = slice(step * config.grad_accum_steps, (step + 1) * config.grad_accum_steps)
        seen = [key for share in shares for batch in share[own] for key in batch]
        assert sorted(seen) == sorted(batch_keys(config, labels, step))


@given(trainings())
@settings(max_examples=60, deadline=None)
def test_an_epoch_sees_no_image_twice_and_the_next_one_another_order(training):
    config, labels, _ = training
    images = len(labels)
    length = steps_per_epoch(config, images)
    epochs = [
        [
            key
            for step in range(number * length, (number + 1) * length)
            for key in batch_keys(config, labels, step)
        ]
        for number in range(2)
    ]
    for number, keys in enumerate(epochs):
        assert {epoch for epoch, _ in keys} == {number}
        assert max(Counter(index for _, index in keys).values()) == 1
        assert all(0 <= index < images for _, index in keys)
    if images > 8:
        assert [index for _, index in epochs[0]] != [index for _, index in epochs[1]]


def test_every_image_has_its_turn():
    config = Config(batch_size=4)
    seen = {index for step in range(40) for _, index in batch_keys(config, LABELS[:7], step)}
    assert seen == set(range(7))


@given(trainings(), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_a_stretch_of_an_epoch_has_of_every_class_its_share(training, epoch):
    config, labels, _ = training
    order = epoch_order(config.replace(sampling="stratified"), labels, epoch)
    assert sorted(order.tolist()) == list(range(len(labels)))
    seen = F.pad(F.one_hot(labels[order]).cumsum(0), (0, 0, 1, 0))
    found = seen[None] - seen[:, None]  # of each class, from one place to another
    share = labels.bincount() / len(labels)
    expected = found.sum(dim=-1, keepdim=True) * share
    assert ((found - expected).abs() <= 1 + len(share) * share + 1e-4).all()


def test_equal_classes_are_equal_in_every_batch():
    labels = torch.arange(8).repeat_interleave(6)
    config = Config(batch_size=16)
    for step in range(30):
        batch = [labels[index] for _, index in batch_keys(config, labels, step)]
        assert set(Counter(map(int, batch)).values()) == {2}


def test_resuming_at_any_step_sees_what_was_left():
    config, processes = Config(batch_size=4, grad_accum_steps=2), Processes(1, 2)
    whole = list(micro_batches(config, LABELS, range(9), processes))
    for step in range(9):
        assert list(micro_batches(config, LABELS, range(step, 9), processes)) == whole[2 * step :]


def test_seeds_differ_between_steps_processes_and_runs():
    seeds = {
        step_seed(Config(seed=seed), step, Processes(rank, 3))
        for seed in range(3)
        for step in range(50)
        for rank in range(3)
    }
    assert len(seeds) == 3 * 50 * 3


def test_batches_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="batch_size 16 exceeds the 9 training images; use .*=4 "):
        steps_per_epoch(Config(batch_size=16), 9)
    with pytest.raises(InputError, match="16 does not divide among 3 processes .* multiple of 6"):
        check_shares(Config(batch_size=16, grad_accum_steps=2), 3)
    check_shares(Config(batch_size=18, grad_accum_steps=2), 3)


def test_steps_decide_the_length_where_they_are_given():
    config = Config(epochs=3, batch_size=4)
    assert total_steps(config, images=10) == 6
    assert total_steps(config.replace(steps=7), images=10) == 7
