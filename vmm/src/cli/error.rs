//! What every command ends with: an exit code, and one chain of causes.

use thiserror::Error;
use umem::handoff::AttachError;
use umem::image::{self, WriteError};
use umem::link::{CredentialsError, ListenError};
use umem::measure::MeasureError;
use umem::pager::{PagerError, StartError};
use umem::region::RegionError;
use umem::source::SourceError;
use umem::source::remote::RemoteError;
use umem::uffd;
use umem::working_set::WorkingSetError;

use super::ctl::CtlError;
use super::options::OptionError;
use crate::boot::{LayoutError, MetadataError, RomError};
use crate::devices::EventLoopError;
use crate::events::EventFileError;
use crate::invalidations::InvalidationsError;
use crate::kvm::{CpuModelError, HostError, VcpuStateError};
use crate::machine::MachineError;
use crate::migration::ArrivalError;
use crate::report::ReportError;
use crate::snapshot::StateError;
use crate::thread_placement::PlacementError;
use crate::working_set::WorkingSetFileError;

/// Exit codes, as the manual promises them.
#[allow(missing_docs)]
pub(super) mod exit_code {
    pub(in crate::cli) const OK: u8 = 0;
    pub(in crate::cli) const RUNTIME: u8 = 1;
    pub(in crate::cli) const USAGE: u8 = 2;
    pub(in crate::cli) const HOST: u8 = 3;
    pub(in crate::cli) const SOURCE_LOST: u8 = 4;
    /// The VM still runs where it was.
    pub(in crate::cli) const MIGRATION: u8 = 5;
    pub(in crate::cli) const CORRUPT: u8 = 6;
    /// The guest ended with code n > 0: this plus n, at most 255.
    pub(in crate::cli) const GUEST: u8 = 64;
    /// A reset or a triple fault that nobody asked for, or a crash that the guest reported.
    pub(in crate::cli) const GUEST_RESET: u8 = 65;
}

/// Why a command failed.
#[derive(Debug, Error)]
pub(super) enum CommandError {
    /// An option's value makes no sense.
    #[error("{option}")]
    Option {
        /// The option.
        option: &'static str,
        /// What is wrong.
        source: OptionError,
    },
    /// Options that do not go together, or an argument that cannot be.
    #[error("{0}")]
    Usage(String),
    /// No image, or not one of ours.
    #[error(transparent)]
    OpenImage(#[from] image::OpenError),
    /// No page server, or none that has the image.
    #[error("cannot load guest memory from a page server")]
    Remote(#[from] RemoteError),
    /// No TLS without certificates.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// No pager in another process, or none that has the image.
    #[error("cannot have guest memory served by another process")]
    Attach(#[from] AttachError),
    /// Nobody can be served.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The server cannot go on.
    #[error("cannot serve")]
    Serve(#[source] std::io::Error),
    /// An image that does not say how to start it.
    #[error("cannot start a guest from '{path}'")]
    Metadata {
        /// The image.
        path: String,
        /// Why.
        source: MetadataError,
    },
    /// An image that is no snapshot that can be restored.
    #[error("cannot restore a VM from '{path}'")]
    Snapshot {
        /// The image.
        path: String,
        /// Why.
        source: StateError,
    },
    /// Nothing can be laid out in RAM.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The image cannot be written.
    #[error(transparent)]
    WriteImage(#[from] WriteError),
    /// The image cannot be read.
    #[error(transparent)]
    ReadImage(#[from] image::ReadError),
    /// The image is not what was written.
    #[error("{0}")]
    CorruptImage(String),
    /// The VM cannot be run.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// No VM came.
    #[error(transparent)]
    Arrival(#[from] ArrivalError),
    /// A page cannot be had.
    #[error("the VM was stopped because a page of its memory cannot be had")]
    Pager(#[from] std::sync::Arc<PagerError>),
    /// A vCPU cannot go on.
    #[error("the VM was stopped because a vCPU cannot go on")]
    Vcpu(#[from] crate::kvm::VcpuError),
    /// The guest did what ends it badly.
    #[error("{what}")]
    Guest {
        /// What it did.
        what: String,
        /// The exit code.
        code: u8,
    },
    /// Nothing can be measured.
    #[error("cannot measure")]
    Measure(#[from] MeasureError),
    /// There is no place for what is drawn.
    #[error("cannot draw into directory '{path}'")]
    Plots {
        /// The directory.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// What measuring needs cannot be had.
    #[error("cannot measure")]
    Scratch(#[source] std::io::Error),
    /// Nobody takes the answer.
    #[error("cannot write to standard output")]
    Output(#[source] std::io::Error),
    /// There is no place for the report.
    #[error(transparent)]
    NoReport(ReportError),
    /// The report cannot be written.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// No working set.
    #[error(transparent)]
    WorkingSet(#[from] WorkingSetFileError),
    /// There is no place for events.
    #[error(transparent)]
    Events(#[from] EventFileError),
    /// Nobody can be told of invalidations.
    #[error(transparent)]
    Invalidations(#[from] InvalidationsError),
    /// A running VM does not do what it is asked.
    #[error(transparent)]
    Ctl(#[from] CtlError),
    /// A VM was not moved.
    #[error(transparent)]
    NotMigrated(CtlError),
    /// The log cannot be written.
    #[error("cannot open log file '{path}'")]
    LogFile {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// This host lacks something.
    #[error("{0}")]
    HostLacks(String),
}

impl CommandError {
    /// The exit code that it asks for.
    pub(super) fn exit_code(&self) -> u8 {
        match self {
            Self::Layout(LayoutError::Memory { .. })
            | Self::ReadImage(image::ReadError::Io { .. })
            | Self::Vcpu(_)
            | Self::Serve(_)
            | Self::Scratch(_)
            | Self::Output(_)
            | Self::Ctl(_)
            | Self::Report(_) => exit_code::RUNTIME,
            Self::NotMigrated(_) => exit_code::MIGRATION,
            Self::Option { .. }
            | Self::Usage(_)
            | Self::NoReport(_)
            | Self::Events(_)
            | Self::Listen(_)
            | Self::Invalidations(_)
            | Self::Credentials(_)
            | Self::Remote(RemoteError::Refused { .. })
            | Self::Attach(AttachError::Refused { .. })
            | Self::LogFile { .. }
            | Self::Plots { .. }
            | Self::Snapshot {
                source: StateError::NotASnapshot,
                ..
            }
            | Self::Layout(_) => exit_code::USAGE,
            Self::OpenImage(error) => open_exit_code(error),
            Self::Metadata { .. } | Self::Snapshot { .. } | Self::CorruptImage(_) | Self::ReadImage(_) => {
                exit_code::CORRUPT
            }
            Self::WriteImage(error) => write_exit_code(error),
            Self::WorkingSet(error) => working_set_exit_code(error),
            Self::Machine(error) => machine_exit_code(error),
            Self::Arrival(error) => arrival_exit_code(error),
            Self::Pager(error) => pager_exit_code(error),
            Self::Guest { code, .. } => *code,
            Self::HostLacks(_) | Self::Measure(MeasureError::Userfaultfd(_)) => exit_code::HOST,
            Self::Measure(_) => exit_code::RUNTIME,
            Self::Remote(_) | Self::Attach(_) => exit_code::SOURCE_LOST,
        }
    }
}

/// A file that is not there, or another than was meant, is a matter of what was asked for.
fn open_exit_code(error: &image::OpenError) -> u8 {
    match error {
        image::OpenError::Io { .. }
        | image::OpenError::OtherBase { .. }
        | image::OpenError::TooManyLayers { .. } => exit_code::USAGE,
        image::OpenError::Base { source, .. } => open_exit_code(source),
        image::OpenError::NotAnImage { .. }
        | image::OpenError::Version { .. }
        | image::OpenError::Corrupt { .. }
        | image::OpenError::Loop { .. } => exit_code::CORRUPT,
    }
}

fn working_set_exit_code(error: &WorkingSetFileError) -> u8 {
    match error {
        WorkingSetFileError::Read { .. }
        | WorkingSetFileError::Write { .. }
        | WorkingSetFileError::Unusable {
            source: WorkingSetError::OtherImage,
            ..
        } => exit_code::USAGE,
        WorkingSetFileError::Unusable { .. } => exit_code::CORRUPT,
    }
}

fn machine_exit_code(error: &MachineError) -> u8 {
    match error {
        MachineError::Host(HostError::Open(_)) => exit_code::RUNTIME,
        MachineError::Arrival(error) => arrival_exit_code(error),
        MachineError::Host(_)
        | MachineError::Cpu(_)
        | MachineError::VcpuState(VcpuStateError::TscFrequency { .. } | VcpuStateError::Xsave { .. })
        | MachineError::CpuModel(CpuModelError::NoAsyncPageFaults)
        | MachineError::Region(RegionError::NoHugePages { .. })
        | MachineError::Invalidations(InvalidationsError::Kernel(_))
        | MachineError::Pager(StartError::Userfaultfd(
            uffd::OpenError::Permission | uffd::OpenError::Unsupported | uffd::OpenError::Features { .. },
        )) => exit_code::HOST,
        MachineError::TooManyCpus { .. }
        | MachineError::Placement(PlacementError::NoneLeft { .. })
        | MachineError::RamTooLarge { .. }
        | MachineError::RamBeyondSlot { .. }
        | MachineError::Region(RegionError::Size { .. } | RegionError::TooLarge { .. })
        | MachineError::Pager(StartError::NoMemory) => exit_code::USAGE,
        MachineError::Rom(error) => match error {
            RomError::Memory { .. } => exit_code::RUNTIME,
            _ => exit_code::USAGE,
        },
        MachineError::EventLoop(
            EventLoopError::Manager(_) | EventLoopError::Event(_) | EventLoopError::Signals(_),
        )
        | MachineError::Vm(_)
        | MachineError::Invalidations(_)
        | MachineError::Vcpu(_)
        | MachineError::CpuModel(_)
        | MachineError::StateList(_)
        | MachineError::VcpuState(_)
        | MachineError::Chipset(_)
        | MachineError::Region(RegionError::Os { .. })
        | MachineError::Pager(_)
        | MachineError::Console(_)
        // The VM has run by then.
        | MachineError::WorkingSet(_)
        | MachineError::Placement(PlacementError::Unknown(_))
        | MachineError::Os(_) => exit_code::RUNTIME,
    }
}

fn arrival_exit_code(error: &ArrivalError) -> u8 {
    match error {
        ArrivalError::Os(_) => exit_code::RUNTIME,
        ArrivalError::Stopped => exit_code::OK,
        _ => exit_code::MIGRATION,
    }
}

fn pager_exit_code(error: &PagerError) -> u8 {
    match error {
        PagerError::Source {
            source: SourceError::Corrupt(_),
            ..
        } => exit_code::CORRUPT,
        PagerError::Source {
            source: SourceError::Lost(_),
            ..
        } => exit_code::SOURCE_LOST,
        PagerError::Install { .. }
        | PagerError::Unaccounted { .. }
        | PagerError::PartlyRemoved { .. }
        | PagerError::Events(_) => exit_code::RUNTIME,
    }
}

fn write_exit_code(error: &WriteError) -> u8 {
    match error {
        WriteError::Exists { .. }
        | WriteError::Metadata { .. }
        | WriteError::TooManyLayers { .. }
        | WriteError::BasePath { .. } => exit_code::USAGE,
        WriteError::Create { source, .. } if is_path_error(source) => exit_code::USAGE,
        WriteError::Create { .. } | WriteError::Write { .. } => exit_code::RUNTIME,
    }
}

/// Whether a file could not be made because of what it was called.
fn is_path_error(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{IsADirectory, NotADirectory, NotFound, PermissionDenied};
    matches!(
        error.kind(),
        NotFound | PermissionDenied | NotADirectory | IsADirectory
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use umem::causes::chain;

    #[test]
    fn a_chain_says_nothing_twice() {
        let source = std::io::Error::from_raw_os_error(2);
        let error = CommandError::OpenImage(image::OpenError::Io {
            path: "x".into(),
            source,
        });
        let chain = chain(&error);
        assert_eq!(
            chain,
            "cannot read image 'x': No such file or directory (os error 2)"
        );
        assert_eq!(error.exit_code(), exit_code::USAGE);
    }
}
