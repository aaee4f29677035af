"""Tickets: double, late and invented words of a reader do nothing, and every claim comes back exactly once."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from shmcast._blocks import Block
from shmcast._layout import MAX_TICKETS, NEVER, PAGE
from shmcast._tickets import Held, Tickets


def block(number: int = 1) -> Block:
    return Block(0, number * PAGE, PAGE, number)


def test_gives_each_reader_its_own_run_of_tickets() -> None:
    tickets = Tickets(4)
    base, claims = tickets.grant([block()], [1, 3], 2, now=5.0)
    assert claims == 4
    assert [tickets.held(reader) for reader in range(4)] == [
        Held(0, 0, None),
        Held(2, 0, 5.0),
        Held(0, 0, None),
        Held(2, 0, 5.0),
    ]
    assert [tickets.opened(1, base + n) for n in range(8)] == [False, False, True, True, False, False, False, False]
    assert [tickets.opened(3, base + n) for n in range(8)] == [False] * 6 + [True, True]


def test_no_ticket_is_given_twice() -> None:
    tickets = Tickets(3)
    bases = [
        tickets.grant([block()], readers, opens, 0.0)[0] for readers in ([0], [], [0, 1, 2]) for opens in (1, 5, 2)
    ]
    assert bases == [1, 4, 19, 25, 28, 43, 49, 52, 67]


def test_a_grant_to_nobody_claims_nothing() -> None:
    tickets = Tickets(2)
    base, claims = tickets.grant([block()], [], 3, 0.0)
    assert claims == 0
    assert not tickets.alive(base, 3)


def test_a_release_counts_once() -> None:
    tickets, one, two = Tickets(2), block(1), block(2)
    base, _ = tickets.grant([one, two], [0, 1], 1, 0.0)
    assert tickets.released(0, base) == (one, two)
    assert tickets.released(0, base) == ()
    assert tickets.released(1, base) == ()
    assert tickets.released(1, base + 1) == (one, two)


def test_an_invented_ticket_does_nothing() -> None:
    tickets = Tickets(2)
    base, _ = tickets.grant([block()], [0], 1, 0.0)
    for ticket in (0, base + 1, base + 2, 2**64 - 1):
        assert not tickets.opened(0, ticket)
        assert tickets.released(0, ticket) == ()
    assert not tickets.opened(1, base)
    assert tickets.held(0) == Held(1, 0, 0.0)


def test_opened_after_released_does_nothing() -> None:
    tickets = Tickets(1)
    base, _ = tickets.grant([block()], [0], 1, 0.0)
    tickets.released(0, base)
    assert not tickets.opened(0, base)
    assert tickets.held(0) == Held(0, 0, None)


def test_withdraw_spares_what_was_opened() -> None:
    tickets, kept, other = Tickets(3), block(1), block(2)
    base, _ = tickets.grant([kept], [0, 1, 2], 2, 0.0)
    later, _ = tickets.grant([other], [0, 1, 2], 2, 0.0)
    tickets.opened(1, base + 3)
    assert list(tickets.withdrawn(base, 2)) == [kept] * 5
    assert list(tickets.withdrawn(base, 2)) == []
    assert tickets.alive(base, 2)
    assert tickets.released(1, base + 3) == (kept,)
    assert not tickets.alive(base, 2)
    assert tickets.alive(later, 2)


def test_death_takes_what_was_opened_too_and_only_of_the_dead() -> None:
    tickets, one, two = Tickets(2), block(1), block(2)
    base, _ = tickets.grant([one], [0, 1], 2, 0.0)
    tickets.grant([one, two], [0], 1, 0.0)
    tickets.opened(0, base)
    assert Counter(tickets.died(0)) == {one: 3, two: 1}
    assert tickets.held(0) == Held(0, 0, None)
    assert tickets.held(1) == Held(2, 0, 0.0)
    assert list(tickets.died(0)) == []
    assert tickets.released(0, base) == ()


def test_discarded_takes_the_unopened_below_and_no_other() -> None:
    tickets, blocks = Tickets(2), [block(n) for n in range(1, 4)]
    bases = [tickets.grant([granted], [0, 1], 1, 0.0)[0] for granted in blocks]
    tickets.opened(0, bases[0])
    assert list(tickets.discarded(0, bases[2])) == [blocks[1]]
    assert list(tickets.discarded(0, bases[2] + 1)) == [blocks[2]]
    assert tickets.held(0) == Held(1, 1, 0.0)
    assert tickets.held(1) == Held(3, 0, 0.0)
    assert list(tickets.discarded(1, NEVER)) == blocks


def test_L7_room_is_counted_for_each_reader() -> None:
    tickets = Tickets(2)
    base, _ = tickets.grant([block()], [0], MAX_TICKETS - 1, 0.0)
    assert tickets.room([0, 1], 1)
    assert not tickets.room([0], 2)
    assert not tickets.room([1, 0], 2)
    assert tickets.room([1], MAX_TICKETS)
    assert not tickets.room([1], MAX_TICKETS + 1)
    assert tickets.room([], MAX_TICKETS + 1)
    tickets.opened(0, base)
    assert not tickets.room([0], 2)
    tickets.released(0, base)
    assert tickets.room([0], 2)


def test_the_oldest_lease_tells_since_when() -> None:
    tickets = Tickets(1)
    first, _ = tickets.grant([block()], [0], 1, 3.0)
    tickets.grant([block()], [0], 1, 8.0)
    assert tickets.held(0).since == 3.0
    tickets.released(0, first)
    assert tickets.held(0).since == 8.0


READERS = 3


@dataclass
class Given:
    """One living ticket of the model."""

    number: int
    reader: int
    base: int
    blocks: tuple[Block, ...]
    since: float
    opened: bool = False


class TicketsMachine(RuleBasedStateMachine):
    """Against a plain list of what is alive; `claims` of each block is how many living tickets name it."""

    def __init__(self) -> None:
        super().__init__()
        self.tickets = Tickets(READERS)
        self.blocks = [block(n) for n in range(1, 5)]
        for one in self.blocks:
            one.claims = 0
        self.alive: list[Given] = []
        self.grants: list[tuple[int, int]] = []
        self.numbers: set[int] = set()
        self.now = 0.0

    @rule(
        chosen=st.lists(st.integers(0, 3), min_size=1, unique=True),
        readers=st.lists(st.integers(0, READERS - 1), unique=True),
        opens=st.integers(1, 3),
    )
    def grant(self, chosen: list[int], readers: list[int], opens: int) -> None:
        self.now += 1
        blocks = tuple(self.blocks[i] for i in chosen)
        base, claims = self.tickets.grant(blocks, readers, opens, self.now)
        assert claims == len(readers) * opens
        for one in blocks:
            one.claims += claims
        for reader in readers:
            for number in range(base + reader * opens, base + (reader + 1) * opens):
                assert number not in self.numbers
                self.numbers.add(number)
                self.alive.append(Given(number, reader, base, blocks, self.now))
        self.grants.append((base, opens))

    @rule(reader=st.integers(0, READERS - 1), number=st.integers(0, 60))
    def opened(self, reader: int, number: int) -> None:
        found = self.find(reader, number)
        assert self.tickets.opened(reader, number) == bool(found)
        for given in found:
            given.opened = True

    @rule(reader=st.integers(0, READERS - 1), number=st.integers(0, 60))
    def released(self, reader: int, number: int) -> None:
        self.end(self.tickets.released(reader, number), self.find(reader, number))

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), opened=st.booleans())
    def of_a_living_one(self, data: st.DataObject, opened: bool) -> None:
        given = data.draw(st.sampled_from(self.alive))
        (self.opened if opened else self.released)(given.reader, given.number)

    @rule(reader=st.integers(0, READERS - 1), below=st.one_of(st.integers(0, 60), st.just(NEVER)))
    def discarded(self, reader: int, below: int) -> None:
        ended = [g for g in self.alive if g.reader == reader and g.number < below and not g.opened]
        self.end(self.tickets.discarded(reader, below), ended)

    @rule(reader=st.integers(0, READERS - 1))
    def died(self, reader: int) -> None:
        self.end(self.tickets.died(reader), [g for g in self.alive if g.reader == reader])

    @precondition(lambda self: self.grants)
    @rule(data=st.data())
    def withdrawn(self, data: st.DataObject) -> None:
        base, opens = data.draw(st.sampled_from(self.grants))
        self.end(self.tickets.withdrawn(base, opens), [g for g in self.alive if g.base == base and not g.opened])

    def find(self, reader: int, number: int) -> list[Given]:
        return [given for given in self.alive if (given.reader, given.number) == (reader, number)]

    def end(self, given_back: Iterable[Block], expected: list[Given]) -> None:
        returned = Counter(given_back)
        assert returned == Counter(one for given in expected for one in given.blocks)
        for one, count in returned.items():
            one.claims -= count
        self.alive = [given for given in self.alive if given not in expected]

    @invariant()
    def claims_are_the_living_tickets(self) -> None:
        claims = Counter(one for given in self.alive for one in given.blocks)
        assert [one.claims for one in self.blocks] == [claims[one] for one in self.blocks]

    @invariant()
    def held_agrees(self) -> None:
        for reader in range(READERS):
            mine = [given for given in self.alive if given.reader == reader]
            since = min((given.since for given in mine), default=None)
            assert self.tickets.held(reader) == Held(len(mine), sum(given.opened for given in mine), since)

    @invariant()
    def grants_live_as_long_as_a_ticket(self) -> None:
        for base, opens in self.grants:
            assert self.tickets.alive(base, opens) == any(given.base == base for given in self.alive)


TicketsMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
TestTicketsMachine = TicketsMachine.TestCase
