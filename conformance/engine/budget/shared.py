"""Budgets that more than one worker of a gate needs: whoever computes one first keeps it where the others find it.

One worker leads the ranks, for all contracts, so that a contract with implementations on many ranks is judged by two workers.
"""

import hashlib
import pickle
from collections.abc import Callable, Collection, MutableMapping
from typing import Any

Store = MutableMapping[str, bytes]

_store: Store = {}  # of this process alone, until it is told of another
_contracts: Collection[str] = ()


def share(store: Store, contracts: Collection[str]) -> None:
    """Keep budgets of these contracts in a store that other processes see too."""
    global _store, _contracts
    _store, _contracts = store, contracts


def once(contract: str, key: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
    """What `compute` returns, computed here or found; `key` tells it from all else of the contract.

    Two workers that begin at the same time both compute it: they get the same bits.
    """
    if contract not in _contracts:
        return compute()
    name = hashlib.sha256(repr((contract, *key)).encode()).hexdigest()
    kept = _store.get(name)
    if kept is not None:
        return pickle.loads(kept)  # of a worker's own
    computed = compute()
    _store[name] = pickle.dumps(computed, protocol=pickle.HIGHEST_PROTOCOL)
    return computed
