//! Who this side is, and whom it trusts: the certificates for TLS.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

/// The CA that both sides' certificates are signed by.
const CA: &str = "ca.pem";
/// This side's certificate, and those between it and the CA.
const CERTIFICATE: &str = "cert.pem";
/// This side's private key.
const KEY: &str = "key.pem";

/// Permission bits of users who are neither the file's owner nor in its group.
const OTHERS: u32 = 0o007;

/// A certificate with its key, and the CA that the other side's certificate must be signed by. For TLS 1.3, and for either side
/// of it.
#[derive(Clone, Debug)]
pub struct Credentials {
    pub(super) client: Arc<ClientConfig>,
    pub(super) server: Arc<ServerConfig>,
}

/// Why a directory has no usable credentials.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// A file is missing, or may not be read.
    #[error("cannot read '{}'", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file has something else in it.
    #[error("'{}' has no {what} in PEM format in it", path.display())]
    NotPem {
        /// The file.
        path: PathBuf,
        /// What belongs there.
        what: &'static str,
    },
    /// The private key is no secret.
    #[error(
        "private key '{path}' is open to every user of this host (mode {mode:04o}): chmod o= '{path}', and make a new key if anybody \
         else can have read it",
        path = path.display()
    )]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// The key belongs to another certificate.
    #[error("private key '{}' is not the key of certificate '{}'", key.display(), certificate.display())]
    Mismatch {
        /// The key.
        key: PathBuf,
        /// The certificate.
        certificate: PathBuf,
    },
    /// What a file has in it cannot be used.
    #[error("'{}' cannot be used for TLS", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Credentials {
    /// Reads `ca.pem`, `cert.pem` and `key.pem` in `directory`.
    ///
    /// A private key that everybody on this host may read is refused and not only warned of: who has it can pass for this side,
    /// and a warning is read when it is too late. Its group may read it, as is usual for keys that several services share.
    pub fn load(directory: &Path) -> Result<Self, CredentialsError> {
        let [ca, certificate, key] = [CA, CERTIFICATE, KEY].map(|name| directory.join(name));
        let mut roots = RootCertStore::empty();
        for root in certificates(&ca)? {
            roots.add(root).map_err(|source| unusable(&ca, source))?;
        }
        let roots = Arc::new(roots);
        let chain = certificates(&certificate)?;
        let secret = private_key(&key)?;
        let wrong_pair = |error| match error {
            rustls::Error::InconsistentKeys(_) => CredentialsError::Mismatch {
                key: key.clone(),
                certificate: certificate.clone(),
            },
            rustls::Error::InvalidCertificate(_) => unusable(&certificate, error),
            error => unusable(&key, error),
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let client = client(&provider, &roots, chain.clone(), secret.clone_key()).map_err(wrong_pair)?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .build()
            .map_err(|source| unusable(&ca, source))?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|source| unusable(&key, source))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, secret)
            .map_err(wrong_pair)?;
        // Connections last. One that is made anew shows its certificate anew, and no state is kept of those that are gone.
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
        })
    }
}

fn client(
    provider: &Arc<CryptoProvider>,
    roots: &Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ClientConfig, rustls::Error> {
    let mut client = ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(Arc::clone(roots))
        .with_client_auth_cert(chain, key)?;
    client.resumption = Resumption::disabled();
    Ok(client)
}

fn unusable(path: &Path, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> CredentialsError {
    CredentialsError::Unusable {
        path: path.to_path_buf(),
        source: source.into(),
    }
}

fn open(path: &Path) -> Result<File, CredentialsError> {
    File::open(path).map_err(|source| CredentialsError::Read {
        path: path.to_path_buf(),
        source,
    })
}

fn pem_error(path: &Path, what: &'static str, error: pem::Error) -> CredentialsError {
    let path = path.to_path_buf();
    match error {
        pem::Error::Io(source) => CredentialsError::Read { path, source },
        _ => CredentialsError::NotPem { path, what },
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, CredentialsError> {
    const WHAT: &str = "certificate";
    let certificates = CertificateDer::pem_reader_iter(open(path)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| pem_error(path, WHAT, error))?;
    if certificates.is_empty() {
        return Err(pem_error(path, WHAT, pem::Error::NoItemsFound));
    }
    Ok(certificates)
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, CredentialsError> {
    let file = open(path)?;
    let metadata = file.metadata().map_err(|source| CredentialsError::Read {
        path: path.to_path_buf(),
        source,
    })?;
    if metadata.mode() & OTHERS != 0 {
        return Err(CredentialsError::Exposed {
            path: path.to_path_buf(),
            mode: metadata.mode() & 0o7777,
        });
    }
    PrivateKeyDer::from_pem_reader(file).map_err(|error| pem_error(path, "private key", error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::test_credentials::Authority;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    /// What is said of a directory that was sound before `spoil`.
    fn spoilt(spoil: impl FnOnce(&Path)) -> CredentialsError {
        let directory = tempfile::tempdir().unwrap();
        Authority::new("CA").issue(directory.path(), "127.0.0.1");
        Credentials::load(directory.path()).unwrap();
        spoil(directory.path());
        Credentials::load(directory.path()).unwrap_err()
    }

    #[test]
    fn what_is_missing_is_named() {
        for name in [CA, CERTIFICATE, KEY] {
            let error = spoilt(|directory| fs::remove_file(directory.join(name)).unwrap());
            assert!(
                matches!(&error, CredentialsError::Read { path, .. } if path.ends_with(name)),
                "{error}"
            );
        }
        assert!(matches!(
            Credentials::load(Path::new("/nowhere")),
            Err(CredentialsError::Read { .. })
        ));
    }

    #[test]
    fn what_is_not_pem_is_named() {
        for name in [CA, CERTIFICATE, KEY] {
            for text in [
                &b""[..],
                b"nonsense",
                &[0xff; 100],
                b"-----BEGIN CERTIFICATE-----\nAAAA\n",
            ] {
                let error = spoilt(|directory| {
                    fs::remove_file(directory.join(name)).unwrap();
                    fs::write(directory.join(name), text).unwrap();
                    fs::set_permissions(directory.join(name), Permissions::from_mode(0o600)).unwrap();
                });
                assert!(
                    matches!(&error, CredentialsError::NotPem { path, .. } if path.ends_with(name)),
                    "{error}"
                );
            }
        }
    }

    #[test]
    fn what_is_pem_and_no_certificate_is_named() {
        for name in [CA, CERTIFICATE] {
            let error = spoilt(|directory| {
                let text = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
                fs::write(directory.join(name), text).unwrap();
            });
            assert!(
                matches!(&error, CredentialsError::Unusable { path, .. } if path.ends_with(name)),
                "{error}"
            );
        }
    }

    #[test]
    fn a_key_of_another_certificate_is_refused() {
        let error = spoilt(|directory| {
            let other = tempfile::tempdir().unwrap();
            Authority::new("other").issue(other.path(), "127.0.0.1");
            fs::copy(other.path().join(KEY), directory.join(KEY)).unwrap();
        });
        assert!(matches!(error, CredentialsError::Mismatch { .. }), "{error}");
    }

    #[test]
    fn a_key_that_everybody_can_read_is_refused() {
        let set = |mode| {
            move |directory: &Path| {
                fs::set_permissions(directory.join(KEY), Permissions::from_mode(mode)).unwrap();
            }
        };
        let error = spoilt(set(0o644));
        assert!(
            matches!(error, CredentialsError::Exposed { mode: 0o644, .. }),
            "{error}"
        );
        let directory = tempfile::tempdir().unwrap();
        Authority::new("CA").issue(directory.path(), "127.0.0.1");
        set(0o640)(directory.path());
        Credentials::load(directory.path()).unwrap();
    }
}
