"""The rules of a grammar as a graph: what is undefined, endless, or too much work for llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator

from edgelora.engine.gbnf_growth import Alternative, Text, find_growing

MAX_CHAIN = 2000  # rules that begin with each other: llama.cpp's check calls itself
MAX_CALLS = 5_000_000  # of that check, which visits a rule as often as it is reached
MAX_STACKS = 4096  # ways to begin: each is tried for every token of the vocabulary


class Rules:
    """Numbered rules; parentheses and repetitions are rules of their own, as in llama.cpp."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.defined: dict[str, int] = {}
        self.alternatives: dict[int, list[Alternative]] = {}
        self.repetitions: list[tuple[int | Text, str]] = []
        self.copies: dict[int, int] = {}
        self.n_symbols = 0  # as llama.cpp counts them
        self._n_numbers = 0

    def symbol(self, name: str) -> int:
        """The number of a named rule, which may be defined later."""
        if name not in self.numbers:
            self.numbers[name] = self.new_symbol()
        return self.numbers[name]

    def new_symbol(self) -> int:
        """The number of a rule without a name."""
        self.n_symbols += 1
        return self._number()

    def define(self, symbol: int, alternatives: list[Alternative]) -> None:
        """Say what a rule is."""
        self.alternatives[symbol] = alternatives

    def repeated(self, item: int | Text, minimum: int, maximum: int | None, n_optional: int) -> int:
        """A rule for `item` repeated; for what can go wrong, more than once is as good as often."""
        symbol = self._number()
        self.n_symbols += n_optional
        self.copies[symbol] = max(1, n_optional)
        if maximum in (0, 1):
            once: list[Alternative] = [[item]] if maximum else []
            self.define(symbol, once + ([] if minimum else [[]]))
            return symbol
        self.repetitions.append((item, f"{{{minimum},{'' if maximum is None else maximum}}}"))
        self.define(symbol, [[item, symbol], []])
        if minimum == 0:
            return symbol
        first = self._number()
        self.define(first, [[item, symbol]])
        return first

    def _number(self) -> int:
        self._n_numbers += 1
        return self._n_numbers - 1

    def name(self, symbol: int) -> str:
        """The name of a rule, for messages."""
        named = {number: name for name, number in self.numbers.items()}
        return named.get(symbol, "a part in parentheses")


def find_problem(rules: Rules) -> str | None:
    """What is wrong with the rules as a whole, in words; None if nothing is."""
    undefined = [name for name, number in rules.numbers.items() if number not in rules.alternatives]
    if undefined:
        return f"no rule is named {', '.join(sorted(undefined)[:6])}"
    if "root" not in rules.defined:
        return "it has no rule named root"
    empty = _fixpoint(rules, terminal=False)
    for item, times in rules.repetitions:
        if isinstance(item, int) and item in empty:
            return f"{rules.name(item)} may be empty and is repeated {times}"
    begins = {
        symbol: [item for one in alternatives for item in _first(one, empty)]
        for symbol, alternatives in rules.alternatives.items()
    }
    order, looping = _bottom_up(begins)
    if looping is not None:
        return f"{rules.name(looping)} begins with itself (left recursion)"
    endless = set(rules.alternatives) - _fixpoint(rules, terminal=True)
    if rules.defined["root"] in endless:
        return "no text that it allows ever ends"
    return _too_much(rules, begins, order, empty) or _growing(rules)


def _growing(rules: Rules) -> str | None:
    symbol = find_growing(rules.alternatives, list(rules.defined.values()))
    if symbol is None:
        return None
    return (
        f"{rules.name(symbol)} can be read in ever more ways at once: let the alternatives that "
        "contain it begin differently"
    )


def _too_much(
    rules: Rules, begins: dict[int, list[int | Text]], order: list[int], empty: set[int]
) -> str | None:
    calls: dict[int, int] = {}
    stacks: dict[int, int] = {}
    chain: dict[int, int] = {}
    n_calls = 0
    for symbol in order:
        inner = [item for item in begins[symbol] if isinstance(item, int)]
        calls[symbol] = 1 + sum(calls[item] for item in inner)
        chain[symbol] = 1 + max((chain[item] for item in inner), default=0)
        ways = sum(stacks[item] if isinstance(item, int) else 1 for item in begins[symbol])
        stacks[symbol] = ways + (symbol in empty)
        n_calls += calls[symbol] * rules.copies.get(symbol, 1)
        if chain[symbol] > MAX_CHAIN or n_calls > MAX_CALLS or stacks[symbol] > MAX_STACKS:
            return f"{rules.name(symbol)} can begin in too many ways"
    return None


def _first(alternative: Alternative, empty: set[int]) -> Iterator[int | Text]:
    """The items that an alternative can begin with."""
    for item in alternative:
        yield item
        if not isinstance(item, int) or item not in empty:
            return


def _fixpoint(rules: Rules, *, terminal: bool) -> set[int]:
    """The rules that can be empty, or (if characters count) that can ever be finished."""
    users: dict[int, list[tuple[int, int]]] = {}
    missing: dict[tuple[int, int], int] = {}
    ready: list[int] = []
    for symbol, alternatives in rules.alternatives.items():
        for i, alternative in enumerate(alternatives):
            inner = {item for item in alternative if isinstance(item, int)}
            if not terminal and not all(isinstance(item, int) for item in alternative):
                continue
            missing[symbol, i] = len(inner)
            for item in inner:
                users.setdefault(item, []).append((symbol, i))
            if not inner:
                ready.append(symbol)
    found: set[int] = set()
    while ready:
        symbol = ready.pop()
        if symbol in found:
            continue
        found.add(symbol)
        for user in users.get(symbol, ()):
            missing[user] -= 1
            if missing[user] == 0:
                ready.append(user[0])
    return found


def _bottom_up(begins: dict[int, list[int | Text]]) -> tuple[list[int], int | None]:
    """The rules in an order in which each comes after those it begins with, or one that loops."""
    order: list[int] = []
    state: dict[int, bool] = {}  # False while a rule's beginnings are being visited
    for start in begins:
        if start in state:
            continue
        state[start] = False
        trail = [(start, iter(begins[start]))]
        while trail:
            symbol, inner = trail[-1]
            rest = (item for item in inner if isinstance(item, int) and not state.get(item))
            item = next(rest, None)
            if item is None:
                trail.pop()
                state[symbol] = True
                order.append(symbol)
            elif item in state:
                return order, item
            else:
                state[item] = False
                trail.append((item, iter(begins[item])))
    return order, None
