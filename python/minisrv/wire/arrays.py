"""The array types of messages, batches and caches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from minisrv.errors import InvalidRequestError

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
UInt8Array = npt.NDArray[np.uint8]


def token_array(token_ids: Sequence[int] | Int32Array) -> Int32Array:
    """Token ids of a prompt as a message carries them.

    Raises InvalidRequestError for an id that no vocabulary has.
    """
    try:
        return np.asarray(token_ids, np.int32)
    except OverflowError:
        wrong = next(id for id in token_ids if not 0 <= id < 2**31)
        raise InvalidRequestError(
            f"prompt holds token id {wrong}; token ids go from 0 to {2**31 - 1}", param="prompt"
        ) from None
