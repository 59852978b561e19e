//! Options of the form `key=value,key=value`, and sizes.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use thiserror::Error;
use umem::handoff::PagerAddress;
use umem::link::AddressError;
use umem::source::remote::RemoteUrl;

/// Why an option's value makes no sense.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum OptionError {
    /// A key that there is not.
    #[error("unknown key '{key}', expected {syntax}")]
    UnknownKey {
        /// The key.
        key: String,
        /// What there is.
        syntax: &'static str,
    },
    /// A key without a value.
    #[error("'{word}' has no value, expected {syntax}")]
    NoValue {
        /// What was given.
        word: String,
        /// What there is.
        syntax: &'static str,
    },
    /// A key more than once.
    #[error("key '{0}' is given more than once")]
    Repeated(&'static str),
    /// A value that the key does not take.
    #[error("{key}={value}: {reason}")]
    Value {
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// What was given for each key of one option.
#[derive(Debug)]
pub(super) struct KeyValues {
    given: Vec<(&'static str, String)>,
}

impl KeyValues {
    /// Takes `text` apart. `keys` are those that there are; `syntax` shows them to people.
    pub(super) fn parse(
        text: &str,
        keys: &[&'static str],
        syntax: &'static str,
    ) -> Result<Self, OptionError> {
        Self::parse_repeating(text, keys, &[], syntax)
    }

    /// The same, where the keys in `repeating` may be given more than once.
    pub(super) fn parse_repeating(
        text: &str,
        keys: &[&'static str],
        repeating: &[&str],
        syntax: &'static str,
    ) -> Result<Self, OptionError> {
        let mut given = Vec::new();
        for word in text.split(',') {
            let (name, value) = match word.split_once('=') {
                Some((name, value)) if !value.is_empty() => (name, value),
                _ => {
                    return Err(OptionError::NoValue {
                        word: word.to_owned(),
                        syntax,
                    });
                }
            };
            let Some(key) = keys.iter().find(|key| **key == name) else {
                return Err(OptionError::UnknownKey {
                    key: name.to_owned(),
                    syntax,
                });
            };
            if given.iter().any(|(other, _)| other == key) && !repeating.contains(key) {
                return Err(OptionError::Repeated(key));
            }
            given.push((*key, value.to_owned()));
        }
        Ok(Self { given })
    }

    /// The value of `key`, read as a `T`; `None` if it was not given.
    pub(super) fn get<T: FromStr<Err: fmt::Display>>(
        &self,
        key: &'static str,
    ) -> Result<Option<T>, OptionError> {
        let Some((_, value)) = self.given.iter().find(|(given, _)| *given == key) else {
            return Ok(None);
        };
        let wrong = |reason: T::Err| OptionError::Value {
            key,
            value: value.clone(),
            reason: reason.to_string(),
        };
        value.parse().map(Some).map_err(wrong)
    }

    /// The value of `key`, which is a number in `range`.
    pub(super) fn get_in(
        &self,
        key: &'static str,
        range: RangeInclusive<usize>,
    ) -> Result<Option<usize>, OptionError> {
        match self.get(key)? {
            Some(value) if !range.contains(&value) => Err(OptionError::Value {
                key,
                value: value.to_string(),
                reason: format!("expected {} to {}", range.start(), range.end()),
            }),
            value => Ok(value),
        }
    }

    /// The values of `key`, each read as a `T`.
    pub(super) fn get_all<T: FromStr<Err: fmt::Display>>(
        &self,
        key: &'static str,
    ) -> Result<Vec<T>, OptionError> {
        let values = self.given.iter().filter(|(given, _)| *given == key);
        values
            .map(|(_, value)| {
                let wrong = |reason: T::Err| OptionError::Value {
                    key,
                    value: value.clone(),
                    reason: reason.to_string(),
                };
                value.parse().map_err(wrong)
            })
            .collect()
    }

    /// The value of `key`, which is one of the words of `choices`.
    pub(super) fn choose<T: Copy>(
        &self,
        key: &'static str,
        choices: &[(&str, T)],
    ) -> Result<Option<T>, OptionError> {
        let Some(value) = self.get::<String>(key)? else {
            return Ok(None);
        };
        if let Some((_, choice)) = choices.iter().find(|(word, _)| *word == value) {
            return Ok(Some(*choice));
        }
        let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
        Err(OptionError::Value {
            key,
            value,
            reason: format!("expected {}", words.join(" or ")),
        })
    }
}

/// On or off.
pub(super) const SWITCH: [(&str, bool); 2] = [("on", true), ("off", false)];

/// A number of bytes: digits, and K, M, G or T for powers of 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size(pub(super) u64);

/// Why a word is no size.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum SizeError {
    /// Not a number.
    #[error("'{0}' is not a size (a number, with K, M, G or T for powers of 1024)")]
    NotASize(String),
    /// More than 2^64 bytes.
    #[error("'{0}' is beyond the address space of any machine")]
    TooLarge(String),
}

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let not_a_size = || SizeError::NotASize(text.to_owned());
        let (digits, shift) = match text.bytes().last() {
            Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
            Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
            Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
            Some(b'T' | b't') => (&text[..text.len() - 1], 40),
            _ => (text, 0),
        };
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(not_a_size());
        }
        let too_large = || SizeError::TooLarge(text.to_owned());
        let number: u64 = digits.parse().map_err(|_| too_large())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(too_large)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.0 > 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

/// A time: a number of seconds, with or without `s` behind it, of milliseconds with `ms`, or of microseconds with `us`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seconds(pub(super) Duration);

impl FromStr for Seconds {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let units = [
            ("ms", Duration::from_millis(1)),
            ("us", Duration::from_micros(1)),
            ("s", Duration::from_secs(1)),
        ];
        let with_unit = units
            .into_iter()
            .find_map(|(name, unit)| Some((text.strip_suffix(name)?, unit)));
        let (number, unit) = with_unit.unwrap_or((text, Duration::from_secs(1)));
        let number: u32 = number
            .parse()
            .map_err(|_| "expected a time such as 30s or 500ms")?;
        Ok(Self(unit * number))
    }
}

/// A time, or two with a `-` in between: any from the first to the second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Between {
    pub(super) min: Duration,
    pub(super) max: Duration,
}

impl FromStr for Between {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (min, max) = text.split_once('-').unwrap_or((text, text));
        let (Seconds(min), Seconds(max)) = (min.parse()?, max.parse()?);
        if min > max {
            return Err("expected the shorter time first");
        }
        Ok(Self { min, max })
    }
}

/// Where RAM comes from, as a source URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum SourceUrl {
    /// `zero:`
    Zero,
    /// `file:PATH`
    File(std::path::PathBuf),
    /// `attach:PATH` or `attach:PATH#NAME`: a pager in another process.
    Pager(PagerAddress),
    /// `unix:PATH`, `unix:PATH#NAME`, `tcp:HOST:PORT` or `tcp:HOST:PORT/NAME`: a page server.
    Remote(RemoteUrl),
}

impl FromStr for SourceUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            Some(("zero", "")) => Ok(Self::Zero),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("attach", address)) => Ok(Self::Pager(address.parse()?)),
            Some(("unix" | "tcp", _)) => text
                .parse()
                .map(Self::Remote)
                .map_err(|error: AddressError| error.to_string()),
            _ => Err("expected zero:, file:PATH, unix:PATH, tcp:HOST:PORT or attach:PATH".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SYNTAX: &str = "a=…,b=on|off";

    fn parse(text: &str) -> Result<KeyValues, OptionError> {
        KeyValues::parse(text, &["a", "b"], SYNTAX)
    }

    #[test]
    fn keys_are_taken_apart() {
        let options = parse("b=on,a=x=y").unwrap();
        assert_eq!(options.get::<String>("a").unwrap().as_deref(), Some("x=y"));
        assert_eq!(options.choose("b", &SWITCH).unwrap(), Some(true));
        assert_eq!(parse("a=1").unwrap().choose("b", &SWITCH).unwrap(), None);
    }

    #[test]
    fn what_makes_no_sense_is_said() {
        assert!(matches!(parse("c=1"), Err(OptionError::UnknownKey { key, .. }) if key == "c"));
        assert!(matches!(parse("a"), Err(OptionError::NoValue { word, .. }) if word == "a"));
        assert!(matches!(parse("a="), Err(OptionError::NoValue { .. })));
        assert!(matches!(parse(""), Err(OptionError::NoValue { .. })));
        assert_eq!(parse("a=1,a=2").unwrap_err(), OptionError::Repeated("a"));
        let error = parse("b=yes").unwrap().choose("b", &SWITCH).unwrap_err();
        assert_eq!(error.to_string(), "b=yes: expected on or off");
        let error = parse("a=x").unwrap().get::<u32>("a").unwrap_err();
        assert!(error.to_string().starts_with("a=x: "), "{error}");
    }

    #[test]
    fn sizes_have_units() {
        for (text, size) in [
            ("0", 0),
            ("4096", 4096),
            ("1K", 1 << 10),
            ("2m", 2 << 20),
            ("3G", 3 << 30),
            ("1T", 1 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Size(size)), "{text}");
        }
        for text in ["", "M", "-1", "+1", "1.5G", "0x10", "1KB", "G1", "é"] {
            assert_eq!(text.parse::<Size>(), Err(SizeError::NotASize(text.to_owned())));
        }
        for text in ["18446744073709551616", "16777216T", "99999999999999999999G"] {
            assert_eq!(text.parse::<Size>(), Err(SizeError::TooLarge(text.to_owned())));
        }
    }

    #[test]
    fn times_have_units_and_ranges() {
        let between = |min, max| Between {
            min: Duration::from_micros(min),
            max: Duration::from_micros(max),
        };
        for (text, expected) in [
            ("2ms", between(2000, 2000)),
            ("150us", between(150, 150)),
            ("0-3", between(0, 3_000_000)),
            ("500us-2s", between(500, 2_000_000)),
        ] {
            assert_eq!(text.parse(), Ok(expected), "{text}");
        }
        for text in ["", "-", "1ms-", "2ms-1ms", "1h", "1ms-2ms-3ms"] {
            assert!(text.parse::<Between>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_printed_size_reads_as_itself(size: u64) {
            prop_assert_eq!(Size(size).to_string().parse(), Ok(Size(size)));
        }

        #[test]
        fn no_text_is_a_panic(text in ".*") {
            let _ = text.parse::<Size>();
            let _ = text.parse::<SourceUrl>();
            let _ = text.parse::<Between>();
            let _ = parse(&text);
        }
    }
}
