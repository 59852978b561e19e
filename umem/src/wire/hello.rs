//! The first frame on every channel, and the answers to it.

use std::fmt;
use std::ops::BitOr;

use super::codes::codes;
use super::fields::{Fields, put_text};
use super::{Epoch, MAX_HELLO, MAX_NAME, MAX_PAGES, MAX_TEXT, MessageType, WireError};
use crate::units::PAGE_SIZE;

/// What a hello and its answers begin with.
const MAGIC: [u8; 8] = *b"umemwire";

/// The version that this program speaks.
pub const VERSION: Version = Version { major: 1, minor: 1 };

/// A version of the protocol. Those with the same major number understand each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// Changes when frames change.
    pub major: u16,
    /// Changes when something is added that the other side need not know.
    pub minor: u16,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// What a side can do beyond the least that all can. A hello offers, the welcome says what both have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Features(pub u64);

impl Features {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// Page data may be compressed with lz4.
    pub const LZ4: Self = Self(1);
    /// The provider may send pages that nobody asked for.
    pub const PUSH: Self = Self(1 << 1);
    /// The fetcher may cancel.
    pub const CANCEL: Self = Self(1 << 2);
    /// The session outlives its channels, and received bitmaps are exchanged.
    pub const RECOVERY: Self = Self(1 << 3);
    /// The provider may discard.
    pub const DISCARD: Self = Self(1 << 4);
    /// The fetcher says where the guest is.
    pub const LOCALITY: Self = Self(1 << 5);
    /// The provider may hand a machine over (since 1.1).
    pub const HANDOVER: Self = Self(1 << 6);
    /// All that this version knows.
    pub const ALL: Self = Self((1 << 7) - 1);

    /// Those that both have.
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether all of `other` are in it.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for Features {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// What a channel is for. It decides the class of all requests on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChannelKind {
    /// Pages that somebody waits for.
    Demand,
    /// Pages that nobody waits for yet.
    Background,
    /// No pages.
    Control,
}

impl ChannelKind {
    const fn code(self) -> u8 {
        match self {
            Self::Demand => 1,
            Self::Background => 2,
            Self::Control => 3,
        }
    }
}

impl fmt::Display for ChannelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Demand => "demand",
            Self::Background => "background",
            Self::Control => "control",
        })
    }
}

/// Which side of a session somebody is, whoever calls whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// It wants pages.
    Fetcher,
    /// It has pages.
    Provider,
}

impl Role {
    /// The other side.
    pub const fn peer(self) -> Self {
        match self {
            Self::Fetcher => Self::Provider,
            Self::Provider => Self::Fetcher,
        }
    }

    const fn code(self) -> u8 {
        match self {
            Self::Fetcher => 1,
            Self::Provider => 2,
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fetcher => "fetcher",
            Self::Provider => "provider",
        })
    }
}

/// What the channels of one VM and its provider have in common. The acceptor of the first channel chooses it, at random.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct SessionId(pub [u8; 16]);

impl SessionId {
    /// In a hello: there is none yet.
    pub const NEW: Self = Self([0; 16]);
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SessionId({self})")
    }
}

/// The first frame of the side that calls.
///
/// ```text
/// offset  size  field
///      0     8  magic "umemwire"
///      8     2  version, major
///     10     2  version, minor
///     12     4  page size, 4096
///     16     8  features offered
///     24     8  pages of RAM; 0: as many as there are
///     32     8  epoch: the highest that the caller knows
///     40     4  keep-alive interval in ms that the caller would like; 0: any
///     44     1  channel: 1 demand, 2 background, 3 control
///     45     1  the caller's role: 1 fetcher, 2 provider
///     46     1  1: the digest is given, 0: it is not
///     47     1  length of the name
///     48    16  session; 0: a new one
///     64    32  digest of the image, or 0
///     96     8  reserved, 0
///    104     n  name of the image, UTF-8
/// 104 + n       what a later minor version adds; skipped
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello<'a> {
    /// The version that the caller speaks.
    pub version: Version,
    /// What the caller can do.
    pub features: Features,
    /// How many pages the RAM has, if the caller knows or wants to be sure.
    pub pages: Option<u64>,
    /// The highest epoch that the caller knows.
    pub epoch: Epoch,
    /// How often the caller would like to hear something; 0: any.
    pub keep_alive_ms: u32,
    /// What the channel is for.
    pub channel: ChannelKind,
    /// What the caller is.
    pub role: Role,
    /// The session that the channel belongs to, or [`SessionId::NEW`].
    pub session: SessionId,
    /// The digest that the image must have.
    pub digest: Option<[u8; 32]>,
    /// The image's name; may be empty: the only one there is.
    pub image: &'a str,
}

/// The answer that opens the channel.
///
/// ```text
/// offset  size  field
///      0     8  magic "umemwire"
///      8     2  version, major: the hello's
///     10     2  version, minor: the lower one
///     12     4  page size, 4096
///     16     8  features agreed: of those offered
///     24     8  pages of RAM
///     32     8  epoch
///     40     4  keep-alive interval in ms, for both sides; 0: none
///     44     2  window: requests that are taken at a time on this channel
///     46     1  1: the digest is given, 0: there is none
///     47     1  reserved, 0
///     48    16  session
///     64    32  digest of the image, or 0
///     96     8  reserved, 0
///    104        what a later minor version adds; skipped
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The version that both speak.
    pub version: Version,
    /// What both can do.
    pub features: Features,
    /// How many pages the RAM has.
    pub pages: u64,
    /// The provider's epoch when it is the one who answers; else the highest that the fetcher knows.
    pub epoch: Epoch,
    /// Each side sends something at least this often; 0: when it has to.
    pub keep_alive_ms: u32,
    /// How many requests are taken on this channel before the first is answered; what is beyond it waits unread.
    pub window: u16,
    /// The session.
    pub session: SessionId,
    /// The image's identity; the RAM of a running machine has none.
    pub digest: Option<[u8; 32]>,
}

codes! {
    /// Why a hello was refused.
    pub enum RefuseCode {
        /// Another major version; the refusal names the refuser's.
        WrongVersion = 1 => "another protocol version",
        /// No image has that name.
        UnknownImage = 2 => "no such image",
        /// The image has another digest.
        WrongDigest = 3 => "the image has another digest",
        /// As many clients or channels as can be; try later.
        Busy = 4 => "busy",
        /// About to leave; try another one.
        Draining = 5 => "about to end",
        /// The caller may not have this.
        NotPermitted = 6 => "not permitted",
        /// The RAM has another size.
        WrongSize = 7 => "another RAM size",
        /// The hello is malformed.
        BadHello = 8 => "malformed hello",
        /// No such session, or it belongs to another image.
        UnknownSession = 9 => "no such session",
        /// The image is there but cannot be used: damaged, or replaced while it was served.
        BadImage = 10 => "the image cannot be used",
        /// A feature that is needed was not offered.
        MissingFeature = 11 => "a feature is missing",
    }
}

/// The answer that closes the channel. Its layout is the same in all versions.
///
/// ```text
/// offset  size  field
///      0     8  magic "umemwire"
///      8     2  the refuser's version, major
///     10     2  the refuser's version, minor
///     12     2  code
///     14     2  length of the text, at most 512
///     16     n  text for people, UTF-8
///  16 + n       what a later version adds; skipped
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused<'a> {
    /// The version that the refuser speaks.
    pub version: Version,
    /// Why.
    pub code: RefuseCode,
    /// Why, for people.
    pub text: &'a str,
}

impl<'a> Hello<'a> {
    pub(super) fn decode(mut fields: Fields<'a>) -> Result<Self, WireError> {
        let version = open(&mut fields)?;
        page_size(&mut fields)?;
        let features = Features(fields.u64()?);
        let pages = pages(&mut fields)?;
        let epoch = Epoch(fields.u64()?);
        let keep_alive_ms = fields.u32()?;
        let channel = match fields.u8()? {
            1 => ChannelKind::Demand,
            2 => ChannelKind::Background,
            3 => ChannelKind::Control,
            code => return Err(fields.wrong("channel", u64::from(code))),
        };
        let role = match fields.u8()? {
            1 => Role::Fetcher,
            2 => Role::Provider,
            code => return Err(fields.wrong("role", u64::from(code))),
        };
        let has_digest = flag(&mut fields)?;
        let name_length = usize::from(fields.u8()?);
        let session = SessionId(fields.array()?);
        let digest = digest(&mut fields, has_digest)?;
        fields.reserved::<8>()?;
        Ok(Self {
            version,
            features,
            pages: (pages != 0).then_some(pages),
            epoch,
            keep_alive_ms,
            channel,
            role,
            session,
            digest,
            image: fields.text("image name", name_length, MAX_NAME)?,
        })
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        let kind = MessageType::Hello;
        if self.image.len() > MAX_NAME || self.image.chars().any(char::is_control) {
            return Err(WireError::Text {
                kind,
                field: "image name",
            });
        }
        let pages = self.pages.unwrap_or(0);
        check_pages(kind, pages, self.pages.is_some())?;
        put_version(out, self.version);
        out.extend_from_slice(&(PAGE_SIZE as u32).to_le_bytes());
        out.extend_from_slice(&self.features.0.to_le_bytes());
        out.extend_from_slice(&pages.to_le_bytes());
        out.extend_from_slice(&self.epoch.0.to_le_bytes());
        out.extend_from_slice(&self.keep_alive_ms.to_le_bytes());
        out.extend_from_slice(&[
            self.channel.code(),
            self.role.code(),
            u8::from(self.digest.is_some()),
            self.image.len() as u8,
        ]);
        out.extend_from_slice(&self.session.0);
        out.extend_from_slice(&self.digest.unwrap_or_default());
        out.extend_from_slice(&[0; 8]);
        out.extend_from_slice(self.image.as_bytes());
        Ok(())
    }
}

impl Welcome {
    /// Whether this can be the answer to `hello`. The caller must not go on with a channel for which it cannot.
    pub fn check(&self, hello: &Hello<'_>) -> Result<(), WireError> {
        let differs = |field| Err(WireError::Welcome { field });
        if self.version.major != hello.version.major || self.version.minor > hello.version.minor {
            differs("version")
        } else if !hello.features.contains(self.features) {
            differs("set of features")
        } else if hello.pages.is_some_and(|pages| pages != self.pages) {
            differs("number of pages")
        } else if hello.session != SessionId::NEW && hello.session != self.session {
            differs("session")
        } else if hello.digest.is_some() && hello.digest != self.digest {
            differs("digest")
        } else {
            Ok(())
        }
    }

    pub(super) fn decode(mut fields: Fields<'_>) -> Result<Self, WireError> {
        let version = open(&mut fields)?;
        page_size(&mut fields)?;
        let features = Features(fields.u64()?);
        let pages = pages(&mut fields)?;
        check_pages(fields.kind, pages, true)?;
        let epoch = Epoch(fields.u64()?);
        let keep_alive_ms = fields.u32()?;
        let window = fields.u16()?;
        if window == 0 {
            return Err(fields.wrong("window", 0));
        }
        let has_digest = flag(&mut fields)?;
        fields.reserved::<1>()?;
        let session = SessionId(fields.array()?);
        check_session(session)?;
        let digest = digest(&mut fields, has_digest)?;
        fields.reserved::<8>()?;
        Ok(Self {
            version,
            features,
            pages,
            epoch,
            keep_alive_ms,
            window,
            session,
            digest,
        })
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        let kind = MessageType::Welcome;
        check_pages(kind, self.pages, true)?;
        check_session(self.session)?;
        if self.window == 0 {
            return Err(WireError::Field {
                kind,
                field: "window",
                value: 0,
            });
        }
        put_version(out, self.version);
        out.extend_from_slice(&(PAGE_SIZE as u32).to_le_bytes());
        out.extend_from_slice(&self.features.0.to_le_bytes());
        out.extend_from_slice(&self.pages.to_le_bytes());
        out.extend_from_slice(&self.epoch.0.to_le_bytes());
        out.extend_from_slice(&self.keep_alive_ms.to_le_bytes());
        out.extend_from_slice(&self.window.to_le_bytes());
        out.extend_from_slice(&[u8::from(self.digest.is_some()), 0]);
        out.extend_from_slice(&self.session.0);
        out.extend_from_slice(&self.digest.unwrap_or_default());
        out.extend_from_slice(&[0; 8]);
        Ok(())
    }
}

impl<'a> Refused<'a> {
    pub(super) fn decode(mut fields: Fields<'a>) -> Result<Self, WireError> {
        let version = magic_and_version(&mut fields)?;
        let code = RefuseCode::from_code(fields.u16()?);
        let length = usize::from(fields.u16()?);
        Ok(Self {
            version,
            code,
            text: fields.text("text", length, MAX_TEXT)?,
        })
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        put_version(out, self.version);
        out.extend_from_slice(&self.code.code().to_le_bytes());
        put_text(out, self.text);
    }
}

const _: () = assert!(104 + MAX_NAME <= MAX_HELLO && 16 + MAX_TEXT <= MAX_HELLO);

fn magic_and_version(fields: &mut Fields<'_>) -> Result<Version, WireError> {
    if fields.array()? != MAGIC {
        return Err(WireError::Magic { kind: fields.kind });
    }
    Ok(Version {
        major: fields.u16()?,
        minor: fields.u16()?,
    })
}

/// Magic and version, the latter one that this program understands.
fn open(fields: &mut Fields<'_>) -> Result<Version, WireError> {
    let version = magic_and_version(fields)?;
    if version.major == VERSION.major {
        Ok(version)
    } else {
        Err(WireError::Version(version))
    }
}

fn put_version(out: &mut Vec<u8>, version: Version) {
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&version.major.to_le_bytes());
    out.extend_from_slice(&version.minor.to_le_bytes());
}

fn page_size(fields: &mut Fields<'_>) -> Result<(), WireError> {
    let size = fields.u32()?;
    if size == PAGE_SIZE as u32 {
        Ok(())
    } else {
        Err(WireError::PageSize(size))
    }
}

fn pages(fields: &mut Fields<'_>) -> Result<u64, WireError> {
    let pages = fields.u64()?;
    check_pages(fields.kind, pages, false)?;
    Ok(pages)
}

fn check_pages(kind: MessageType, pages: u64, some: bool) -> Result<(), WireError> {
    if pages <= MAX_PAGES && (pages > 0 || !some) {
        Ok(())
    } else {
        Err(WireError::Field {
            kind,
            field: "number of pages",
            value: pages,
        })
    }
}

fn check_session(session: SessionId) -> Result<(), WireError> {
    if session == SessionId::NEW {
        Err(WireError::Field {
            kind: MessageType::Welcome,
            field: "session",
            value: 0,
        })
    } else {
        Ok(())
    }
}

fn flag(fields: &mut Fields<'_>) -> Result<bool, WireError> {
    match fields.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        value => Err(fields.wrong("digest flag", u64::from(value))),
    }
}

fn digest(fields: &mut Fields<'_>, given: bool) -> Result<Option<[u8; 32]>, WireError> {
    let digest = fields.array()?;
    if given {
        Ok(Some(digest))
    } else if digest == [0; 32] {
        Ok(None)
    } else {
        Err(fields.wrong("digest where none is given", u64::from(digest[0])))
    }
}
