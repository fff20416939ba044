"""At which Hub is a model asked for, and who asks? huggingface_hub knows: by `HF_ENDPOINT`, `HF_TOKEN` or `hf auth login`."""

from __future__ import annotations

from ray_streamer.errors import CredentialsError, SettingsError
from ray_streamer.storage.bounded_call import call_within
from ray_streamer.storage.http_head import VISIBLE
from ray_streamer.storage.http_route import is_http_address

_EVERYBODYS = "https://huggingface.co"


def usable_endpoint(endpoint: str) -> str:
    """The Hub's address, without a "/" at its end; that of everybody if there is none.

    Raises:
        SettingsError: It is no address, or one with a user.
    """
    address = endpoint.strip().rstrip("/") or _EVERYBODYS
    # A user would be repeated, and a query would end up inside of addresses.
    if is_http_address(address) and VISIBLE.fullmatch(address) and not set("@?#") & set(address):
        return address
    has_user = "@" in address
    raise SettingsError(
        f"HF_ENDPOINT (not shown) {'has a user or password in it' if has_user else 'is no address'}; give one such as {_EVERYBODYS}"
        + (", and a token in HF_TOKEN" if has_user else "")
    )


def find_token(given: str, *, timeout_seconds: float) -> str | None:
    """Who asks, a secret; None for nobody in particular.

    Args:
        given: By the settings; empty for whom huggingface_hub finds, which may have to renew it.
        timeout_seconds: For huggingface_hub.

    Raises:
        CredentialsError: huggingface_hub fails, or the token cannot be sent.
    """
    token = given or _token_within(timeout_seconds)
    if token and not VISIBLE.fullmatch(token):
        raise CredentialsError(
            "the token of the Hub (not shown) has characters that cannot be sent; set HF_TOKEN again"
        )
    return token


def _token_within(seconds: float) -> str | None:
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_DISABLE_IMPLICIT_TOKEN

    if HF_HUB_DISABLE_IMPLICIT_TOKEN:
        return None
    try:
        return call_within(seconds, get_token, what="token of the Hub")
    except TimeoutError:
        raise CredentialsError(
            f"huggingface_hub found no token in {seconds:g} s (credentials_timeout_seconds); set HF_TOKEN"
        ) from None
    except Exception as error:
        # It asks other servers and reads files, with errors of every kind, which may quote what they read.
        raise CredentialsError(f"huggingface_hub cannot find a token ({type(error).__name__}); set HF_TOKEN") from None
