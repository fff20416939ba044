"""How does a local server speak TLS? With a certificate of its own authority, which a client is told to trust."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Certificates:
    """Files in PEM form.

    Attributes:
        ca_file: The authority; what clients trust.
        server_file: The server's chain and key.
    """

    ca_file: Path
    server_file: Path


def make_certificates(folder: Path) -> Certificates:
    """A new authority, and its certificate for 127.0.0.1, s3.localhost and every bucket.s3.localhost, in `folder`."""
    import trustme

    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1", "s3.localhost", "*.s3.localhost")
    made = Certificates(folder / "ca.pem", folder / "server.pem")
    authority.cert_pem.write_to_path(made.ca_file)
    certificate.private_key_and_cert_chain_pem.write_to_path(made.server_file)
    return made
