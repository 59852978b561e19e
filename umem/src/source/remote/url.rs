//! The name of an image on a page server.

use std::fmt;
use std::str::FromStr;

use crate::link::{Address, AddressError};

/// A page server and an image on it: `tcp:HOST:PORT`, `tcp:HOST:PORT/NAME`, `unix:PATH`, `unix:PATH#NAME`.
///
/// What is behind the last `#` is the name, so that a path may have that character: one that does is written with a `#` at its
/// end where no name is wanted.
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
        let parts = if text.starts_with("unix:") {
            text.rsplit_once('#')
        } else {
            text.split_once('/')
        };
        let (address, image) = parts.unwrap_or((text, ""));
        Ok(Self {
            address: address.parse()?,
            image: image.to_owned(),
        })
    }
}

impl fmt::Display for RemoteUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.address)?;
        let (separator, ambiguous) = match &self.address {
            Address::Unix(path) => ('#', path.as_os_str().as_encoded_bytes().contains(&b'#')),
            Address::Tcp(_) => ('/', false),
        };
        if self.image.is_empty() && !ambiguous {
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
            ("unix:/run/#1/umem#base", "base"),
            ("unix:/run/#1/umem#", ""),
        ] {
            let url: RemoteUrl = text.parse().unwrap();
            assert_eq!(url.image, image);
            assert_eq!(url.to_string(), text);
        }
        let url: RemoteUrl = "unix:/run/#1/umem#".parse().unwrap();
        assert_eq!(url.address, Address::Unix("/run/#1/umem".into()));
        assert!("tcp:host/base".parse::<RemoteUrl>().is_err());
    }
}
