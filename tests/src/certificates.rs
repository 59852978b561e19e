//! A CA, and directories for `--tls-dir`.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose,
    date_time_ymd,
};

/// A certificate authority.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    /// One of this name.
    pub fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Makes a directory with the credentials of `host`, a DNS name or an IP address.
    pub fn issue(&self, directory: PathBuf, host: &str) -> PathBuf {
        self.issue_until(directory, host, 4000)
    }

    /// The same, with a certificate that expires when this year begins.
    pub fn issue_until(&self, directory: PathBuf, host: &str, year: i32) -> PathBuf {
        let mut params = CertificateParams::new([host.to_owned()]).unwrap();
        params.not_after = date_time_ymd(year, 1, 1);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        fs::create_dir(&directory).unwrap();
        self.trust(&directory);
        fs::write(directory.join("cert.pem"), certificate.pem()).unwrap();
        fs::write(directory.join("key.pem"), key.serialize_pem()).unwrap();
        fs::set_permissions(directory.join("key.pem"), Permissions::from_mode(0o600)).unwrap();
        directory
    }

    /// Makes this the CA that is trusted by who uses `directory`.
    pub fn trust(&self, directory: &Path) {
        fs::write(directory.join("ca.pem"), self.0.pem()).unwrap();
    }
}
