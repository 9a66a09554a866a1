"""What the Hub's refusals and a broken line mean to a person, as one error each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from edgelora.errors import HubError, HubUnreachable

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

_MISSING = 'pulling needs huggingface_hub: pip install "edgelora[hub]"'
_LOG_IN = "Log in with a token that may read it: `hf auth login`, or the variable HF_TOKEN."


@contextlib.contextmanager
def explained(repository: str, url: str) -> Iterator[None]:
    """Errors of huggingface_hub inside the block become a HubError that says what to do.

    Args:
        repository: as a person writes it, `org/name`.
        url: of its page, where access is asked for.

    Raises:
        HubError: it does not exist, is gated or private, or a file is missing from it.
        HubUnreachable: no connection, or the Hub itself is out of order.
    """
    try:
        from huggingface_hub import errors
    except ImportError as error:
        raise HubError(_MISSING) from error
    try:
        yield
    except errors.HfHubHTTPError as error:
        raise _refusal(error, repository, url) from error
    except errors.HTTPError as error:
        raise HubUnreachable(
            f"{repository}: the connection failed ({_first_line(error)})",
            hint="Run the same command again: it goes on where it stopped.",
        ) from error
    except errors.HFValidationError as error:
        raise HubError(
            f"{repository}: not the name of a repository", hint="It is written org/name."
        ) from error


def _refusal(error: HfHubHTTPError, repository: str, url: str) -> HubError:
    from huggingface_hub import errors

    status = error.response.status_code
    if isinstance(error, errors.GatedRepoError):
        return HubError(
            f"{repository}: gated: its owner wants to be asked", hint=f"Ask at {url}. {_LOG_IN}"
        )
    if isinstance(error, errors.EntryNotFoundError | errors.RevisionNotFoundError):
        return HubError(
            f"{repository}: a file that it listed is not there any more",
            hint="Run the same command again.",
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return HubError(
            f"{repository}: no such repository, or a private one",
            hint=f"Look whether {url} is there. {_LOG_IN}",
        )
    if status == 403:
        return HubError(f"{repository}: forbidden ({_first_line(error)})", hint=_LOG_IN)
    if status == 429 or status >= 500:
        return HubUnreachable(
            f"{repository}: the Hub answers {status}, and did so again after waiting",
            hint="Run the same command later: it goes on where it stopped.",
        )
    return HubError(f"{repository}: the Hub refuses ({_first_line(error)})")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
