"""Does a Ray cluster answer at this address, and does it let this process in?

Both are tried before Ray is given the address. Where nobody answers, Ray ends the whole process after two minutes. Where
a token is missing, it tries for 20 seconds and tells the reason three causes deep.

Ray sends its token by itself only to a cluster that it found. The address of the same cluster, written out, gets it too;
any other host does not get a token that nobody said was for it. A cluster that asks for no token gets none: whoever sends one
also asks for one, and refuses the calls by which the cluster asks after its actors.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

import ray.exceptions
from ray._private import services
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without stubs
from ray.exceptions import RayError

from ray_streamer.errors import ClusterError, SettingsError

logger = logging.getLogger(__name__)

NO_CLIENT = (
    "Ray Client (ray://) keeps this process outside the cluster, where placement cannot be seen: submit the program "
    "with `ray job submit`, or run it on a node of the cluster"
)

_MODE_VARIABLE = "RAY_AUTH_MODE"
# Ray knows tokens since 2.51.
_AuthenticationError: type[RayError] | tuple[()] = getattr(ray.exceptions, "AuthenticationError", ())


def check_address(address: str | None) -> None:
    """Refuses what is no address, and one with a user in it, which would be shown in errors.

    Raises:
        SettingsError: It cannot be used; repeats no user.
    """
    if address is not None and not isinstance(address, str):
        raise SettingsError(f"address is the text host:port, auto or local, got {type(address).__name__}")
    if address and "@" in address:
        raise SettingsError(
            "the address of a Ray cluster has a user in it, and addresses appear in errors and logs; leave the user out, and set "
            "RAY_AUTH_MODE=token if the cluster asks for a token"
        )


def find_cluster(address: str | None, connect_timeout_seconds: float) -> str | None:
    """`host:port` of the cluster that answers and lets this process in; None when a local Ray is to be started.

    Args:
        address: `host:port`, "auto", "local", or None to look for a cluster.
        connect_timeout_seconds: How long the address may take to answer.

    Raises:
        SettingsError: It is no address.
        ClusterError: Nobody answers there, or without a token that this process does not have.
    """
    named = os.environ.get("RAY_ADDRESS") if address in (None, "auto") else address
    check_address(named)
    if named and named.startswith("ray://"):
        raise ClusterError(NO_CLIENT)
    origin = "RAY_ADDRESS" if named and named != address else "address"
    if named and "://" in named:
        hint = "; that of `ray job submit` is another one" if origin == "RAY_ADDRESS" else ""
        raise SettingsError(f"{origin} of a Ray cluster is the text host:port, auto or local, got {named!r}{hint}")
    try:
        # Private, but there is no public way to learn the address without using it.
        known = services.canonicalize_bootstrap_address(address)  # pyright: ignore[reportArgumentType]
        if known is None:
            return None
        host, _, port = known.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), connect_timeout_seconds).close()
    except (OSError, ValueError) as error:
        if not named and address is None:
            logger.info("the cluster that Ray remembers is gone (%s); starting a local one", error)
            return None
        reason = "it is no host:port" if isinstance(error, ValueError) else error
        raise ClusterError(
            f"no Ray cluster answers at {origin}={named or address!r}: {reason}. Give the host:port of its head node, "
            "unset it to start a local Ray, or start one with `ray start --head`"
        ) from error
    _enter(known, connect_timeout_seconds)
    return known


def resolved(address: str) -> str | None:
    """`host:port` with the number of the host, as Ray writes it; None where that cannot be found out."""
    try:
        return services.canonicalize_bootstrap_address(address)
    except (OSError, ValueError):
        return None


def _enter(known: str, timeout_seconds: float) -> None:
    """Make sure that the cluster takes this process's token, or needs none."""
    try:
        _knock(known, timeout_seconds)
    except _AuthenticationError as refusal:
        if os.environ.get(_MODE_VARIABLE) is None and _is_found_by_ray(known) and _take_token():
            try:
                _knock(known, timeout_seconds)
            except _AuthenticationError as second_refusal:
                raise no_entry(known, second_refusal) from second_refusal
        else:
            raise no_entry(known, refusal) from refusal


def _knock(known: str, timeout_seconds: float) -> None:
    """Ask the cluster for its id, as every client does first.

    Raises:
        AuthenticationError: It asks for another token, or for one at all.
        ClusterError: What answers there is no Ray of this version.
    """
    if _AuthenticationError:
        from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled

        # Without a token in token mode, Ray's own client ends the process.
        ensure_token_if_auth_enabled(None, create_token_if_missing=False)
    answered: Future[None] = Future()
    threading.Thread(target=_ask, args=(known, answered), name="ray_streamer-knock", daemon=True).start()
    try:
        answered.result(timeout_seconds)
    except FutureTimeoutError:
        reason = f"no answer within connect_timeout_seconds={timeout_seconds:g}"
    except _AuthenticationError:
        raise
    except (RayError, RuntimeError, ConnectionError) as error:
        reason = str(error).rstrip(".")
    else:
        return
    raise ClusterError(
        f"something answers at {known}, but not as the control service of a Ray cluster: {reason}. Give the host:port "
        "that `ray start --head` printed, and use the same version of Ray"
    )


def _ask(known: str, answered: Future[None]) -> None:
    # In a thread of its own: Ray's client waits for 20 to 40 s, whatever it is told.
    try:
        GcsClient(address=known)
    except BaseException as error:
        answered.set_exception(error)
    else:
        answered.set_result(None)


def _is_found_by_ray(known: str) -> bool:
    """Whether this is the cluster that Ray's own "auto" would find on this machine."""
    return known == services.find_bootstrap_address(None) or known in services.find_gcs_addresses()


def _take_token() -> bool:
    """Use the token that Ray finds for this user, as it does for "auto"; False when there is none."""
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

    return maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def is_refusal(error: BaseException) -> bool:
    """Whether Ray says by this error that a token is missing or wrong."""
    return isinstance(error, _AuthenticationError)


def why_ended_at_once(death: object) -> str | None:
    """Why Ray ended an actor before it ran, when it says that nobody holds the actor, and this process does; else None.

    The cluster asks the process that holds an actor, and takes a refusal for its end.
    """
    if "references to the actor were removed" not in str(death) or not is_token_auth_enabled():
        return None
    return (
        f"This process asks for a token in every call ({_MODE_VARIABLE}=token, which Ray also sets when it starts a Ray of its own), "
        f"but the cluster seems to have none. Connect from a new process with {_MODE_VARIABLE}=disabled, or give the cluster a token"
    )


def no_entry(known: str, refusal: Exception) -> ClusterError:
    """The error of a cluster at `known` that asked for a token and was given none, or another one."""
    mode = os.environ.get(_MODE_VARIABLE)
    said = str(getattr(refusal, "message", refusal)).strip().rstrip(".")
    return ClusterError(
        f"the Ray cluster at {known} lets nobody in without its token, and {_MODE_VARIABLE} is {mode or 'not set'} "
        f"here. Set {_MODE_VARIABLE}=token, and give the token of the head node in RAY_AUTH_TOKEN, in the file that "
        "RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token (`ray get-auth-token` prints it there). "
        f"Ray says: {said}"
    )
