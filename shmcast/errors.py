"""Everything that shmcast raises, one class per reaction of the caller.

    ShmcastError
    ├── ClosedError              you closed it: a bug in the caller
    ├── PeerDied                 a rank is gone; the message names it
    ├── ArenaFull                no block before the deadline
    ├── StaleHandle              withdrawn, released or opened too often
    ├── MaterializeError         fn raised on the entry rank, and there are no raw inputs here
    ├── EncodeError(TypeError)   the object cannot be flattened; names the path
    │   └── NotAllowed           a class outside the allow-list; says how to allow it
    └── LayoutError(ValueError)  bytes that are not what they claim

A `ShmcastError` of no subclass is a control plane that failed while every peer lives
(a timeout, a collective that another rank never joined): make a new process group.
"""

import os


class ShmcastError(Exception):
    """Base of all errors of this library."""


class ClosedError(ShmcastError):
    """The object was closed, or was made before a fork and is used in the child.

    You do *not* get this when a peer closed or died: that is `PeerDied` or `StaleHandle`.
    """


class PeerDied(ShmcastError):
    """A rank is gone: the kernel says that the lock it held is free. The message names the rank.

    You do *not* get this for a slow peer, however slow; tensors that are mapped already stay valid.
    """


class ArenaFull(ShmcastError):
    """No block of the size wanted came free in time, or there is no shared memory at all.

    Collectives never raise it, they fall back; `publish`, `share` and `empty` do.
    """


class StaleHandle(ShmcastError):
    """The message behind this handle may not be read (any more) by this reader.

    It was withdrawn, discarded, opened more often than `opens` allows, or is meant for other readers.
    """


class MaterializeError(ShmcastError):
    """`fn` raised on the entry rank, and this rank holds no raw inputs to run it itself.

    The message carries the entry rank's error text. A rank that does hold raw inputs gets `fn`'s own exception.
    """


class EncodeError(ShmcastError, TypeError):
    """The object cannot be flattened; the message names the path inside it and the reason."""


class NotAllowed(EncodeError):
    """A class outside the allow-list; the message names it and says how to allow it."""


class LayoutError(ShmcastError, ValueError):
    """Bytes that are not what they claim: foreign, damaged, or of another version."""


class UnknownRequest(ShmcastError, LookupError):
    """No request of this key waits here: never submitted, taken already, or aborted; the message says which."""


def closed_error(what: str, pid: int) -> ClosedError:
    """The error of an end that is used after `close`, or in a child of process `pid`, which made it."""
    here = os.getpid()
    if here == pid:
        return ClosedError(f"{what} was closed: make a new one")
    return ClosedError(
        f"{what} belongs to process {pid}, from which this one, {here}, was forked: make one after the fork"
    )
