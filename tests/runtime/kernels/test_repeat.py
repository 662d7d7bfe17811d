"""Operators repeat what they did in Python: the same bits in memory of the same order, of any data."""

import functools
import logging
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompiler.runtime import coders, convolutions, products
from qcompiler.runtime.kernels import repeat
from qcompiler.runtime.kernels.loader import explain_vectors
from qcompiler.runtime.kernels.table import multiply_runs

SPEC = "int8:max:tensor:nearest:pass"
NEAREST, STOCHASTIC = "int8:max:b2c4:nearest:pass", "int8:max:b2c4:stochastic:pass"
FOUR = "int4:max:b2c4:nearest:pass"
#: of scales that are float32
WHOLE, BLOCKS = "int8:real:tensor:nearest:pass", "int8:real:b2c4:nearest:pass"
needs_vectors = pytest.mark.skipif(explain_vectors() != "", reason=explain_vectors())


@pytest.fixture(autouse=True)
def started():
    """Nothing is recorded yet."""
    assert repeat.start() == ""
    repeat.forget()
    yield
    repeat.forget()


def draw_codes(*shape):
    codes = torch.randint(-127, 128, shape, dtype=torch.int8)
    return codes.to(memory_format=torch.channels_last) if len(shape) == 4 else codes


def draw_image(dtype=torch.float32):
    return torch.randn(4, 8, 6, 6).to(dtype).to(memory_format=torch.channels_last)


def give_product(bias=True):
    sides = draw_codes(9, 40), torch.rand(9), None, draw_codes(40, 12), torch.rand(1), None
    return (*sides, torch.randn(12) if bias else None, SPEC, SPEC, 1, 12, "whole")


def give_runs():
    a, b = draw_codes(9, 80), draw_codes(80, 12)
    return a, torch.rand(9, 3), 1, b, torch.rand(1, 3), 12, 32, "runs"


def give_pair(a, b, edges, *behind):
    sides = a, torch.rand(1), None, b, torch.rand(1), None, None
    return (*sides, SPEC, SPEC, *edges, *behind, True)


def give_forward(dtype=torch.float32):
    windows = [-1, -1], [6, 5], [1, 1], [1, 1]
    return give_pair(draw_codes(2, 8, 6, 5), draw_codes(4, 8, 3, 3), (2, 4), "convolve", dtype, *windows)


def give_input(kernel=3):
    """Of a convolution that skips every other position: four calls of the kernel."""
    geometry = [2, 2], [1, 1], [1, 1], [6, 5]
    a, b = draw_codes(2, 4, 3, 3), draw_codes(4, 8, kernel, kernel)
    return give_pair(a, b, (2, 8), "convolve", torch.float32, *geometry)


def give_gradient():
    windows = [-1, -1], [6, 5], [1, 1], [3, 3], [1, 1]
    a, b = draw_codes(2, 4, 6, 5), draw_codes(2, 8, 6, 5)
    return give_pair(a, b, (4, 8), "convolve-gradient", torch.float32, *windows)


def give_blocks(dtype=torch.float32, spec=NEAREST, parts=1):
    key = torch.randint(-9999, 9999, (2,), dtype=torch.int32) if spec == STOCHASTIC else None
    return draw_image(dtype), key, spec, "bcss", "site", True, parts == 1, parts


def give_known():
    return draw_image(), torch.rand(1, 1, 1, 1), None, None, WHOLE, "bcss", "site", True, True, False


def give_measured():
    reach = torch.tensor([[-1.0], [1.0]])
    return draw_image(), torch.rand(1, 1, 1, 1), None, reach, None, WHOLE, "bcss", "site", True, True, True, True


def give_codes():
    return draw_codes(4, 8, 6, 6), 2.0 ** torch.randint(-3, 3, (2, 2, 6, 6)), None, BLOCKS, "bcss", torch.float32


def give_unpacked():
    return torch.randint(-7, 8, (4, 6), dtype=torch.int8), 4


def give_packed():
    return torch.randint(0, 256, (2, 6), dtype=torch.uint8), [4, 6], 4, True


#: (operator, its reference, a maker of arguments of one kind, with other numbers at every call)
CASES = [
    pytest.param("multiply_whole", products.multiply_whole, give_product, marks=needs_vectors),
    pytest.param("multiply_runs", multiply_runs, give_runs, marks=needs_vectors),
    pytest.param("convolve_codes", convolutions.convolve_codes, give_forward, marks=needs_vectors),
    pytest.param("convolve_input", convolutions.convolve_input, give_input, marks=needs_vectors),
    pytest.param("convolve_gradient", convolutions.convolve_gradient, give_gradient, marks=needs_vectors),
    ("quantize_blocks", coders.quantize_blocks, give_blocks),
    ("quantize_blocks", coders.quantize_blocks, functools.partial(give_blocks, torch.bfloat16, STOCHASTIC)),
    ("quantize_blocks", coders.quantize_blocks, functools.partial(give_blocks, spec=FOUR, parts=2)),
    ("quantize_by", coders.quantize_by, give_known),
    ("quantize_measured", coders.quantize_measured, give_measured),
    ("dequantize_blocks", coders.dequantize_blocks, give_codes),
    ("pack_codes", coders.pack_codes, give_unpacked),
    ("unpack_codes", coders.unpack_codes, give_packed),
]


def call(name, *arguments):
    """The results of an operator as a list."""
    results = getattr(torch.ops.qcompiler, name).default(*arguments)
    return results if isinstance(results, list) else [results]


def get_bytes(tensor):
    return tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8).tolist()


def list_bits(results):
    """What two equal results have in common, the order of memory included."""
    tensors = results if isinstance(results, list) else [results]
    return [(one.dtype, one.shape, one.stride(), get_bytes(one)) for one in tensors]


def run_often(name, give, times=4):
    """Call an operator with arguments of one kind; the last call is repeated, if the kind can be."""
    for _ in range(times - 1):
        call(name, *give())
    return call(name, *give())


def test_every_operator_has_a_case():
    assert {case.values[0] if isinstance(case, type(CASES[0])) else case[0] for case in CASES} == set(repeat.NAMES)


@pytest.mark.parametrize(("name", "reference", "give"), CASES)
def test_a_repeated_call_gives_the_bits_of_python(name, reference, give):
    for recorded in (0, 1, 1, 1):
        arguments = give()
        assert list_bits(call(name, *arguments)) == list_bits(reference(*arguments))
        assert repeat.count_recordings() in (recorded, 0 if recorded == 0 else 1)
    assert repeat.count_recordings() == 1


@pytest.mark.parametrize(("name", "reference", "give"), CASES)
def test_results_are_memory_of_their_own(name, reference, give):
    arguments = give()
    run_often(name, lambda: arguments)
    first, second = call(name, *arguments), call(name, *arguments)
    addresses = [one.data_ptr() for one in (*first, *second)]
    assert len(set(addresses)) == len(addresses)


@needs_vectors
@pytest.mark.parametrize(
    "give",
    [
        lambda: (*(arguments := give_forward())[:4], arguments[1], *arguments[5:]),  # one tensor twice
        lambda: (draw_codes(2, 8, 6, 5).int(), *give_forward()[1:]),  # is cast first
        lambda: (*give_forward()[:12], torch.float64, *give_forward()[13:]),  # is cast behind
        lambda: (
            torch.empty(2, 0, 6, 5, dtype=torch.int8),
            *give_forward()[1:3],
            draw_codes(4, 0, 3, 3),
            *give_forward()[4:],
        ),
    ],
)
def test_what_torch_computes_stays_in_python(give, caplog):
    with caplog.at_level(logging.DEBUG, "qcompiler"):
        run_often("convolve_codes", give)
    assert repeat.count_recordings() == 0
    assert [row.getMessage()[:42] for row in caplog.records] == ["convolve_codes runs in Python every time: "]
    arguments = give()
    assert list_bits(call("convolve_codes", *arguments)) == list_bits(convolutions.convolve_codes(*arguments))


@needs_vectors
def test_inputs_that_no_tap_meets_stay_in_python():
    """They are zeros that torch writes."""
    give = functools.partial(give_input, kernel=1)
    run_often("convolve_input", give)
    assert repeat.count_recordings() == 0
    arguments = give()
    assert list_bits(call("convolve_input", *arguments)) == list_bits(convolutions.convolve_input(*arguments))


def test_every_kind_of_arguments_is_recorded_by_itself():
    x, *others = give_blocks()
    for one in (x, x.contiguous(), x.bfloat16(), x[:2], x[..., :3]):
        for _ in range(3):
            arguments = (one, *others)
            assert list_bits(call("quantize_blocks", *arguments)) == list_bits(coders.quantize_blocks(*arguments))
    for wanted in ((True, False), (False, True)):
        run_often("quantize_blocks", lambda wanted=wanted: (*give_blocks()[:5], *wanted, 1))
    run_often("quantize_blocks", functools.partial(give_blocks, spec=STOCHASTIC))
    # the sliced one is not dense, and copied first
    assert repeat.count_recordings() == 4 + 2 + 1


def test_another_number_of_threads_is_another_kind():
    run_often("quantize_blocks", give_blocks)
    torch.set_num_threads(2)
    try:
        run_often("quantize_blocks", give_blocks)
        assert repeat.count_recordings() == 2
    finally:
        torch.set_num_threads(1)


def test_one_call_is_not_recorded():
    """A recording takes eight times as long as a call, and shapes may change with every step."""
    call("quantize_blocks", *give_blocks())
    assert repeat.count_recordings() == 0
    call("quantize_blocks", *give_blocks())
    assert repeat.count_recordings() == 1


def test_recordings_do_not_grow_forever():
    codes, counts = torch.zeros(2, 6000, dtype=torch.int8), []
    for length in range(1, 5000):
        for _ in range(2):
            call("pack_codes", codes[:, :length].contiguous(), 4)
        counts.append(repeat.count_recordings())
    assert 4000 < max(counts) <= 4096
    assert counts[-1] < 1000


def test_threads_call_at_once():
    arguments = [give_blocks() for _ in range(8)]
    expected = [list_bits(coders.quantize_blocks(*given)) for given in arguments]
    wrong = []

    def run(given, known):
        wrong.extend(1 for _ in range(50) if list_bits(call("quantize_blocks", *given)) != known)

    threads = [threading.Thread(target=run, args=pair) for pair in zip(arguments, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert repeat.count_recordings() == 1


def test_without_a_compiler_everything_runs_in_python(monkeypatch):
    monkeypatch.setattr(repeat, "load_library", lambda name: "no compiler")
    for cached in (repeat.start, repeat.load):
        cached.cache_clear()
    try:
        assert repeat.start() == "no compiler"
        assert repeat.count_recordings() == 0
        repeat.forget()
    finally:
        for cached in (repeat.start, repeat.load):
            cached.cache_clear()


def test_torch_is_told_in_front_of_a_step(monkeypatch):
    """And not by the thread that compiles the library, while operators run."""
    started = []
    monkeypatch.setattr(repeat, "start", lambda: started.append(1))
    repeat.load.cache_clear()
    repeat.start_when_loaded()
    assert not started
    repeat.load()
    repeat.start_when_loaded()
    assert started


@st.composite
def windows(draw):
    """Arguments of a convolution, for one or two dimensions of space."""
    dims, order = draw(st.integers(1, 2)), draw(st.booleans())
    space, taps, step, dilation = (
        [draw(st.integers(*ends)) for _ in range(dims)] for ends in ((3, 9), (1, 3), (1, 2), (1, 2))
    )
    samples, channels, columns = (draw(st.integers(1, 5)) for _ in range(3))
    start = [draw(st.integers(-2, 0)) for _ in range(dims)]
    count = [draw(st.integers(1, 6)) for _ in range(dims)]
    shapes = (samples, channels, *space), (columns, channels, *taps)
    return shapes, (draw(st.integers(1, samples)), draw(st.integers(1, columns))), (start, count, step, dilation), order


@needs_vectors
@settings(max_examples=60, deadline=None)
@given(windows())
def test_convolutions_of_any_shape(case):
    (image, weight), edges, where, is_last = case
    scales = [torch.rand(-(-shape[0] // edge)) for shape, edge in zip((image, weight), edges, strict=True)]
    for _ in range(3):
        a, b = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in (image, weight))
        sides = a, scales[0], None, b, scales[1], None, torch.randn(weight[0])
        arguments = (*sides, SPEC, SPEC, *edges, "convolve", torch.float32, *where, is_last)
        assert list_bits(call("convolve_codes", *arguments)) == list_bits(convolutions.convolve_codes(*arguments))
