"""The tape: when storages end, and how autograd adds gradients where branches meet."""

from __future__ import annotations

import pytest

from skipcost.bench.memory.tape import Size, Tape, Value

MAP = Size(0, 0, 4, per_image=True)


def _branched(tape: Tape, *, view: bool = False, shared: bool = False) -> int:
    """Read a map twice, the later reader also passing its gradient to `other` where it is shared; count gradients."""

    def parameter() -> Value:
        made = tape.make(MAP, "weight", "parameter")
        made.parameter = True
        return made

    def passing(_tape: Tape, gradient: Value) -> list[Value]:
        return [Value(gradient.storage, MAP, whole=not view) for _ in range(2 if shared else 1)]

    def making(tape: Tape, gradient: Value) -> list[Value]:
        return [tape.result(MAP, (gradient,), kind="map gradient")]

    def ending(tape: Tape, gradient: Value) -> list[Value]:
        return [tape.result(MAP, (gradient,), kind="map gradient") for _ in range(2)]

    other = tape.differentiate(tape.result(MAP, ()), (parameter(),), making)
    source = tape.differentiate(tape.result(MAP, ()), (parameter(),), making)
    first = tape.differentiate(tape.result(MAP, (source,)), (source,), making)
    second = tape.differentiate(tape.result(MAP, (source,)), (source, other) if shared else (source,), passing)
    loss = tape.differentiate(tape.result(MAP, (first, second)), (first, second), ending)
    before = len(tape.sizes)
    tape.run_backward(loss)
    return len(tape.sizes) - before


@pytest.mark.parametrize(
    ("traced", "view", "shared", "made"),
    [(False, False, False, 0), (True, False, False, 1), (False, True, False, 1), (False, False, True, 1)],
    ids=["in place", "under a mode", "into a view", "someone else refers to it"],
)
def test_gradients_are_added_in_place_where_autograd_does(*, traced: bool, view: bool, shared: bool, made: int) -> None:
    """The sum takes a storage of its own under a mode, for a view, and where another node waits for the same one."""
    plain = 5 + (1 if shared else 0)  # the loss's, two of its inputs', the first reader's, the weights'

    count = _branched(Tape(traced=traced), view=view, shared=shared)

    assert count == plain + made


def test_a_storage_ends_with_its_last_reader() -> None:
    """One that is never read ends where it is made; a hold is a reader."""
    tape = Tape()

    unread = tape.result(MAP, ())
    read = tape.result(MAP, ())
    tape.result(MAP, (read,))
    tape.hold(read)

    assert tape.ends == [0, 3, 2]
    assert (unread.storage, read.storage) == (0, 1)


def test_what_comes_again_has_storages_of_its_own() -> None:
    """A second time reads what was there before; state is made once, and a gradient ends where the second begins."""
    tape = Tape()
    weight = tape.make(MAP, "weight", "parameter")
    tape.run((weight,))
    first = len(tape.ends)
    made = tape.result(MAP, (weight,), "map")
    tape.result(MAP, (), "moment", "optimizer")
    tape.gradients[weight.storage] = tape.result(MAP, (made,), "gradient", "gradient")

    tape.again(1, first)

    assert (tape.made, tape.begins) == ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 6])
    assert tape.ends[1:] == [3, 2, 4, 6, 6]
    assert tape.names[4:] == ["map", "gradient"]
    assert tape.gradients[weight.storage].storage == 5
