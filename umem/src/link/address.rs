//! Where a page server is.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Where a page server is: `unix:PATH` or `tcp:HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A host name or address (IPv6 in brackets), and a port.
    Tcp(String),
}

/// Why a word is no address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not an address: expected unix:PATH or tcp:HOST:PORT")]
pub struct AddressError(String);

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let wrong = || AddressError(text.to_owned());
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            Some(("tcp", host_and_port)) => {
                let (host, port) = host_and_port.rsplit_once(':').ok_or_else(wrong)?;
                let bracketed = host.starts_with('[') && host.ends_with(']');
                let ambiguous = host.contains(':') && !bracketed;
                if host.is_empty() || ambiguous || port.parse::<u16>().is_err() {
                    return Err(wrong());
                }
                Ok(Self::Tcp(host_and_port.to_owned()))
            }
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(host_and_port) => write!(f, "tcp:{host_and_port}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_printed() {
        for text in [
            "unix:/run/umem",
            "tcp:host:1",
            "tcp:127.0.0.1:80",
            "tcp:[::1]:8080",
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "unix:",
            "tcp:",
            "tcp:host",
            "tcp::1",
            "tcp:host:x",
            "tcp:host:65536",
            "tcp:::1:80",
            "file:x",
        ] {
            assert_eq!(text.parse::<Address>(), Err(AddressError(text.to_owned())));
        }
    }
}
