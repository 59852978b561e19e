//! A CA for tests, and certificates of it.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose,
    date_time_ymd,
};

use super::Credentials;

/// A certificate authority.
pub(crate) struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Writes the credentials of a host to `directory`.
    pub(crate) fn issue(&self, directory: &Path, host: &str) {
        self.issue_until(directory, host, 4000);
    }

    /// The same, with a certificate that ends with `year`.
    pub(crate) fn issue_until(&self, directory: &Path, host: &str, year: i32) {
        let mut params = CertificateParams::new([host.to_owned()]).unwrap();
        params.not_after = date_time_ymd(year, 1, 1);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        fs::write(directory.join("ca.pem"), self.0.pem()).unwrap();
        fs::write(directory.join("cert.pem"), certificate.pem()).unwrap();
        fs::write(directory.join("key.pem"), key.serialize_pem()).unwrap();
        fs::set_permissions(directory.join("key.pem"), Permissions::from_mode(0o600)).unwrap();
    }

    /// Credentials of a host.
    pub(crate) fn credentials(&self, host: &str) -> Credentials {
        let directory = tempfile::tempdir().unwrap();
        self.issue(directory.path(), host);
        Credentials::load(directory.path()).unwrap()
    }
}
