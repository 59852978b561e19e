//! The name of an image on a page server.

use std::fmt;
use std::str::FromStr;

use crate::link::{Address, AddressError};

/// A page server and an image on it: `tcp:HOST:PORT`, `tcp:HOST:PORT/NAME`, `unix:PATH`, `unix:PATH#NAME`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteUrl {
    /// Where the server is.
    pub address: Address,
    /// The image's name; empty: the only one there is.
    pub image: String,
}

impl FromStr for RemoteUrl {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let separator = if text.starts_with("unix:") { '#' } else { '/' };
        let (address, image) = text.split_once(separator).unwrap_or((text, ""));
        Ok(Self {
            address: address.parse()?,
            image: image.to_owned(),
        })
    }
}

impl fmt::Display for RemoteUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let separator = if matches!(self.address, Address::Unix(_)) {
            '#'
        } else {
            '/'
        };
        write!(f, "{}", self.address)?;
        if self.image.is_empty() {
            Ok(())
        } else {
            write!(f, "{separator}{}", self.image)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_a_server_and_an_image() {
        for (text, image) in [
            ("tcp:host:1", ""),
            ("tcp:[::1]:80/base", "base"),
            ("unix:/run/umem", ""),
            ("unix:/run/umem#base", "base"),
        ] {
            let url: RemoteUrl = text.parse().unwrap();
            assert_eq!(url.image, image);
            assert_eq!(url.to_string(), text);
        }
        assert!("tcp:host/base".parse::<RemoteUrl>().is_err());
    }
}
