"""Who may talk to a cluster: Ray's token authentication, on clusters we start and on clusters we join.

A private cluster gets a token of its own, which lives only in the environment of its processes. On a cluster that
others run the mode is the administrator's and stays as it is; a token that is missing or wrong is found out here
within seconds, because Ray itself keeps trying for a minute or more.
"""

import os
import secrets
from pathlib import Path

from raysteer.errors import ClusterError

HOW = (
    "set RAY_AUTH_MODE=token and give the token in RAY_AUTH_TOKEN, in a file named by RAY_AUTH_TOKEN_PATH, or in "
    "~/.ray/auth_token (on the head, ray get-auth-token prints it)"
)
# Any method of the cluster's control service would do: requests are authenticated before they are read.
_METHOD = "/ray.rpc.NodeInfoGcsService/GetClusterId"


def own_token() -> str | None:
    """The user's token, from where Ray looks for it; None if there is none."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    try:
        file = Path(named) if named else Path.home() / ".ray" / "auth_token"
        return file.read_text(encoding="utf-8").strip() or None
    except (OSError, RuntimeError):  # RuntimeError: a user without a home folder
        return None


def mode() -> str:
    """ "token", "disabled", or "" where the user has not said."""
    return os.environ.get("RAY_AUTH_MODE", "").lower()


def guard_private_cluster() -> bool:
    """Switch token authentication on for a cluster about to be started, unless the user has switched it off. Call
    before ray is imported.

    Returns:
        Whether the cluster has a fresh token that nobody but this process and its children knows.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if mode() != "token" or own_token() is not None:
        return False
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    return True


def check_token(address: str, timeout_s: float) -> None:
    """Refuse a head (its host:port) that asks for a token we do not have. Says nothing where it cannot tell.

    Raises:
        ClusterError: the token is missing or is not this cluster's.
    """
    import grpc  # type: ignore[import-untyped]

    if os.environ.get("RAY_ENABLE_K8S_TOKEN_AUTH"):  # Ray then takes the token of the service account
        return
    token = own_token() if mode() != "disabled" else None
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_METHOD)(b"", timeout=timeout_s, metadata=metadata)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise token_error(f"cluster.address {address}", token) from None


def token_error(subject: str, token: str | None) -> ClusterError:
    """What to say when a cluster asks for a token and `token` was all we had."""
    if token is not None:
        return ClusterError(subject, "it refuses our token", f"use this cluster's own: {HOW}")
    if mode() == "disabled":
        return ClusterError(subject, "it asks for a token, and RAY_AUTH_MODE is disabled here", HOW)
    return ClusterError(subject, "it asks for a token, and there is none here", HOW)
