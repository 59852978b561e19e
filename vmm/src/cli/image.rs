//! `umem image`.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::{Args, Subcommand};
use guest::fingerprint::Fingerprint;
use umem::image::{Image, ImageWriter, Layer};
use umem::publish::Existing;
use umem::units::{PAGE_SIZE, PageIndex};

use super::error::CommandError;
use super::options::Size;
use super::progress;
use crate::boot::{ImageMetadata, Kernel, Layout, LayoutConfig};
use crate::snapshot::{self, SnapshotState};

/// What there is to do with images.
#[derive(Debug, Subcommand)]
pub(super) enum ImageVerb {
    /// Lay a guest's RAM out in a file
    Create(CreateOptions),
    /// Say what is in an image
    Info(InfoOptions),
    /// Read every byte of an image, and of all that it is laid over, and check it
    Verify(VerifyOptions),
}

#[derive(Debug, Args)]
pub(super) struct CreateOptions {
    /// Size of the guest's RAM: a multiple of 4K; K, M, G, T are powers of 1024
    #[arg(long, value_name = "SIZE")]
    memory: Size,
    /// Kernel: a bzImage (vmlinuz), or an ELF file with a PVH entry (vmlinux) [default: the built-in guest]
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial RAM disk for the kernel
    #[arg(long, value_name = "FILE")]
    initramfs: Option<PathBuf>,
    /// Kernel command line [default: workload=hello for the built-in guest]
    #[arg(long, value_name = "TEXT")]
    cmdline: Option<String>,
    /// Fill the pages that the layout does not use: pattern:SEED writes a fingerprint that workload=verify checks
    #[arg(long, value_name = "pattern:SEED")]
    fill: Option<FillPattern>,
    /// Replace FILE if it is there
    #[arg(long)]
    force: bool,
    /// The image
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct InfoOptions {
    /// The image
    image: PathBuf,
    /// As JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct VerifyOptions {
    /// The image
    image: PathBuf,
}

/// `pattern:SEED`.
#[derive(Clone, Copy, Debug)]
pub(super) struct FillPattern {
    seed: u64,
}

impl FromStr for FillPattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let seed = text.strip_prefix("pattern:").and_then(|seed| seed.parse().ok());
        seed.map(|seed| Self { seed })
            .ok_or_else(|| "expected pattern:SEED, where SEED is a number".into())
    }
}

pub(super) fn run(verb: &ImageVerb) -> Result<(), CommandError> {
    match verb {
        ImageVerb::Create(options) => create(options),
        ImageVerb::Info(options) => info(options),
        ImageVerb::Verify(options) => verify(&options.image),
    }
}

fn create(options: &CreateOptions) -> Result<(), CommandError> {
    let layout = Layout::build(&LayoutConfig {
        ram_size: options.memory.0,
        kernel: options.kernel.clone().map_or(Kernel::BuiltIn, Kernel::File),
        initramfs: options.initramfs.clone(),
        command_line: options.cmdline.clone(),
    })?;
    // Before minutes are spent on its content; another that comes meanwhile is found when the image gets its name.
    if !options.force && options.output.symlink_metadata().is_ok() {
        return Err(umem::image::WriteError::Exists {
            path: options.output.clone(),
        }
        .into());
    }
    let mut writer = ImageWriter::create(&options.output, layout.ram().size())?;
    write_pages(&layout, options.fill, &mut writer)?;

    let kernel = options
        .kernel
        .as_ref()
        .map_or("built-in".into(), |path| path.display().to_string());
    let fill = options.fill.map(|fill| format!("pattern:{}", fill.seed));
    let metadata = ImageMetadata::new(&layout, kernel, fill).encode();
    let metadata = metadata.map_err(|source| CommandError::Metadata {
        path: options.output.display().to_string(),
        source,
    })?;
    let existing = if options.force {
        Existing::Replace
    } else {
        Existing::Keep
    };
    let footer = writer.finish(&metadata, existing)?;
    say!(
        "{}: {} RAM, {} of {} pages hold something",
        options.output.display(),
        options.memory,
        footer.data_pages,
        footer.ram_size / PAGE_SIZE as u64
    );
    Ok(())
}

fn write_pages(
    layout: &Layout,
    fill: Option<FillPattern>,
    writer: &mut ImageWriter,
) -> Result<(), CommandError> {
    let mut content = [0; PAGE_SIZE];
    let Some(FillPattern { seed }) = fill else {
        for (page, _) in layout.pages() {
            layout.read_page(page, &mut content);
            writer.write_page(PageIndex(page), &content)?;
        }
        return Ok(());
    };
    let progress = progress::bar("filling", layout.ram().size());
    for range in layout.ram().ranges() {
        for offset in (range.offset..range.offset + range.size).step_by(PAGE_SIZE) {
            let page = PageIndex::containing(offset);
            if layout.is_used(page.0) {
                layout.read_page(page.0, &mut content);
            } else {
                // By where the guest sees it, so that a page at the wrong address is found.
                let frame = (range.guest.0 + offset - range.offset) / PAGE_SIZE as u64;
                Fingerprint::new(seed, frame).fill(&mut content);
            }
            writer.write_page(page, &content)?;
            if page.0.is_multiple_of(256) {
                progress.set_position(offset);
            }
        }
    }
    progress.finish_and_clear();
    Ok(())
}

fn info(options: &InfoOptions) -> Result<(), CommandError> {
    let path = options.image.display().to_string();
    let image = Image::open(&options.image)?;
    let footer = image.footer();
    if snapshot::is_snapshot(image.metadata()) {
        return snapshot_info(options, &image);
    }
    let metadata = ImageMetadata::decode(image.metadata()).map_err(|source| CommandError::Metadata {
        path: path.clone(),
        source,
    })?;
    let digest = blake3::Hash::from_bytes(footer.digest).to_hex();
    if options.json {
        let object = serde_json::json!({
            "image": path, "ram_size": footer.ram_size, "pages": image.pages(), "data_pages": footer.data_pages,
            "digest": digest.as_str(), "layers": image.layers().map(describe).collect::<Vec<_>>(), "metadata": metadata,
        });
        say!("{object:#}");
        return Ok(());
    }
    say!("image         {path}");
    say_ram(&image)?;
    say!("kernel        {}", metadata.kernel);
    say!(
        "entry         {:?} at {:#x}",
        metadata.entry.protocol,
        metadata.entry.entry
    );
    say!("command line  {}", metadata.command_line);
    say!("fill          {}", metadata.fill.as_deref().unwrap_or("none"));
    say!("digest        {digest}");
    Ok(())
}

/// How much RAM is in an image, and in which files.
fn say_ram(image: &Image) -> Result<(), CommandError> {
    let footer = image.footer();
    match &footer.base {
        None => say!(
            "RAM           {} ({} pages, {} hold something)",
            Size(footer.ram_size),
            image.pages(),
            footer.data_pages
        ),
        Some(base) => say!(
            "RAM           {} ({} pages, {} are not the base's, {} of them hold something)",
            Size(footer.ram_size),
            image.pages(),
            base.own_pages,
            footer.data_pages
        ),
    }
    for layer in image.layers().skip(1) {
        say!(
            "over          {} ({} pages, digest {})",
            layer.path().display(),
            layer.footer().checksums(),
            blake3::Hash::from_bytes(layer.footer().digest)
        );
    }
    Ok(())
}

/// A file of an image, for programs.
fn describe(layer: &Layer) -> serde_json::Value {
    let footer = layer.footer();
    serde_json::json!({
        "file": layer.path(), "own_pages": footer.checksums(), "data_pages": footer.data_pages,
        "digest": blake3::Hash::from_bytes(footer.digest).to_hex().as_str(),
    })
}

fn snapshot_info(options: &InfoOptions, image: &Image) -> Result<(), CommandError> {
    let path = options.image.display().to_string();
    let footer = image.footer();
    let state = SnapshotState::decode(image.metadata(), footer.ram_size).map_err(|source| {
        CommandError::Snapshot {
            path: path.clone(),
            source,
        }
    })?;
    let digest = blake3::Hash::from_bytes(footer.digest).to_hex();
    if options.json {
        let object = serde_json::json!({
            "image": path, "ram_size": footer.ram_size, "pages": image.pages(), "data_pages": footer.data_pages,
            "digest": digest.as_str(), "layers": image.layers().map(describe).collect::<Vec<_>>(),
            "snapshot": {
                "version": state.version(), "created": state.created(), "cpus": state.cpus(),
                "cpu_vendor": state.cpu().vendor(), "async_pf": state.async_pf(),
            },
        });
        say!("{object:#}");
        return Ok(());
    }
    say!("snapshot      {path}");
    say_ram(image)?;
    say!("vCPUs         {} of {}", state.cpus(), state.cpu().vendor());
    say!("async_pf      {}", if state.async_pf() { "on" } else { "off" });
    say!("created       {} s after 1970 began", state.created());
    say!("digest        {digest}");
    Ok(())
}

fn verify(path: &Path) -> Result<(), CommandError> {
    let image = Image::open(path)?;
    let mut damaged = None;
    // All of them, so that one hears of everything that is wrong.
    for layer in image.layers() {
        if let Err(error) = verify_layer(layer) {
            damaged.get_or_insert(error);
        }
    }
    damaged.map_or(Ok(()), Err)
}

fn verify_layer(layer: &Layer) -> Result<(), CommandError> {
    let progress = progress::bar("verifying", layer.footer().ram_size);
    let verified = layer.verify(|pages| progress.set_position(pages * PAGE_SIZE as u64))?;
    progress.finish_and_clear();
    for page in &verified.corrupt {
        say!("page={page} offset={:#x} wrong", page.byte_offset());
    }
    let path = layer.path().display();
    if verified.corrupt_count > 0 {
        return Err(CommandError::CorruptImage(format!(
            "image '{path}' is corrupt: {} of its pages do not match their checksums, the first is page {}",
            verified.corrupt_count, verified.corrupt[0]
        )));
    }
    if !verified.digest_matches {
        return Err(CommandError::CorruptImage(format!(
            "image '{path}' is corrupt: its checksum table does not match its digest"
        )));
    }
    say!(
        "{path}: {} pages right, {} of them hold something",
        layer.footer().checksums(),
        verified.data_pages
    );
    Ok(())
}
