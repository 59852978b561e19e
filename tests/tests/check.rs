//! `umem check`, `umem image info`, and what the program says of itself.

#![allow(clippy::unwrap_used)] // A helper of a test panics as the test does.

use serde_json::Value;
use tests::need;
use tests::program::Program;
use tests::scratch::Scratch;

#[test]
fn a_host_that_has_everything() {
    need!(tests::host::kvm());
    let check = Program::umem(["check"]).run();
    check.assert_code(0);
    assert_eq!(check.stderr, "");
    for word in ["/dev/kvm", "userfaultfd", "huge pages"] {
        assert!(check.stdout.to_lowercase().contains(word), "{check}");
    }
    let json = Program::umem(["check", "--json"]).run();
    json.assert_code(0);
    let value: Value = serde_json::from_str(&json.stdout).unwrap();
    assert!(value.is_object() || value.is_array(), "{json}");
    assert!(json.stdout.contains("userfaultfd"), "{json}");
}

#[test]
fn what_is_missing_is_named_with_the_remedy() {
    need!(tests::host::mount_namespace());
    let hidden = |args| {
        let script = format!("mount -t tmpfs none /dev\nexec \"$0\" check {args}");
        Program::in_mount_namespace(&script).run()
    };
    let check = hidden("");
    check.assert_code(3);
    let line = check
        .stdout
        .lines()
        .find(|line| line.contains("/dev/kvm"))
        .unwrap_or_else(|| panic!("{check}"));
    assert!(check.stdout.contains("modprobe"), "{line}\n{check}");
    let json = hidden("--json");
    json.assert_code(3);
    let _: Value = serde_json::from_str(&json.stdout).unwrap();
    assert!(json.stdout.contains("modprobe"), "{json}");
}

#[test]
fn an_image_says_what_is_in_it() {
    let scratch = Scratch::new();
    let image = scratch.fingerprinted("8M", 5, "order=random");
    let info = Program::umem(["image", "info"]).arg(&image).run();
    info.assert_code(0);
    for word in [
        image.to_str().unwrap(),
        "8M",
        "workload=verify",
        "pattern:5",
        "built-in",
    ] {
        assert!(info.stdout.contains(word), "{word}: {info}");
    }
    let json = Program::umem(["image", "info", "--json"]).arg(&image).run();
    json.assert_code(0);
    let value: Value = serde_json::from_str(&json.stdout).unwrap();
    assert_eq!(value["ram_size"], 8 << 20);
    assert_eq!(value["pages"], 2048);
    assert_eq!(
        value["metadata"]["command_line"],
        "workload=verify pages=all seed=5 order=random"
    );
}

/// The same image, made twice, is the same: its digest is its identity.
#[test]
fn images_are_reproducible() {
    let scratch = Scratch::new();
    let other = Scratch::new();
    let digest = |scratch: &Scratch, seed| {
        let image = scratch.fingerprinted("8M", seed, "");
        let json = Program::umem(["image", "info", "--json"]).arg(&image).run();
        let value: Value = serde_json::from_str(&json.stdout).unwrap();
        std::fs::remove_file(image).unwrap();
        value["digest"].as_str().unwrap().to_owned()
    };
    assert_eq!(digest(&scratch, 1), digest(&other, 1));
    assert_ne!(digest(&scratch, 1), digest(&other, 2));
}

#[test]
fn help_is_there_for_everything() {
    for args in [
        &["--help"][..],
        &["run", "--help"],
        &["image", "--help"],
        &["image", "create", "--help"],
        &["image", "info", "--help"],
        &["image", "verify", "--help"],
        &["check", "--help"],
        &["--version"],
    ] {
        let help = Program::umem(args).run();
        help.assert_code(0);
        assert!(!help.stdout.is_empty());
        assert_eq!(help.stderr, "");
    }
    // Without any argument, help is what is missing.
    let nothing = Program::umem([""; 0]).run();
    nothing.assert_code(2);
    assert!(nothing.stderr.contains("Usage"), "{nothing}");
}
