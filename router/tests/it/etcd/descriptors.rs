//! What `tools/protoc` hands out is what etcd-client's own files say.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use prost::Message as _;

const FILES: [&str; 5] = [
    "etcd/api/authpb/auth.proto",
    "etcd/api/etcdserverpb/rpc.proto",
    "etcd/api/mvccpb/kv.proto",
    "etcd/server/etcdserver/api/v3election/v3electionpb/v3election.proto",
    "etcd/server/etcdserver/api/v3lock/v3lockpb/v3lock.proto",
];

/// Where cargo has unpacked the crate that this workspace is locked to.
fn etcd_client() -> PathBuf {
    let version = Command::new("rustc").arg("-vV").output().unwrap();
    let version = String::from_utf8(version.stdout).unwrap();
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).unwrap();
    // Nobody needs the packages of other platforms here.
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--offline", "--filter-platform", host, "--manifest-path"])
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let package = metadata["packages"].as_array().unwrap().iter().find(|package| package["name"] == "etcd-client");
    let manifest = package.unwrap()["manifest_path"].as_str().unwrap();
    Path::new(manifest).parent().unwrap().to_owned()
}

#[test]
fn the_descriptors_are_those_of_the_etcd_client_in_use() {
    let (package, tools) = (etcd_client(), Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools"));
    let mut compiler = protox::Compiler::new([package.join("proto")]).unwrap();
    compiler.include_imports(true).include_source_info(false).open_files(FILES).unwrap();
    let expected = compiler.file_descriptor_set().encode_to_vec();
    if std::env::var_os("ANTIPHON_WRITE_DESCRIPTORS").is_some() {
        let sum = "cd \"$1\" && find . -name '*.proto' | LC_ALL=C sort | xargs cat | cksum";
        let sum = Command::new("sh").args(["-c", sum, "sh"]).arg(package.join("proto")).output().unwrap();
        std::fs::write(tools.join("etcd.descriptors"), &expected).unwrap();
        std::fs::write(tools.join("etcd.descriptors.cksum"), sum.stdout).unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("set");
    let mut protoc = Command::new(tools.join("protoc"));
    protoc.current_dir(&package).arg("--include_imports").arg("-o").arg(&out).args(["-I", "proto"]).args(FILES);
    let output = protoc.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(
        std::fs::read(&out).unwrap() == expected,
        "run this test with ANTIPHON_WRITE_DESCRIPTORS=1 and look at them"
    );
}

#[test]
fn files_of_another_release_are_not_served() {
    let dir = tempfile::tempdir().unwrap();
    let rpc = dir.path().join("proto/etcd/api/etcdserverpb/rpc.proto");
    std::fs::create_dir_all(rpc.parent().unwrap()).unwrap();
    std::fs::write(&rpc, "syntax = \"proto3\";").unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/protoc");
    let out = dir.path().join("set");
    let mut protoc = Command::new(script.canonicalize().unwrap());
    protoc.current_dir(dir.path()).arg("-o").arg(&out).args(["-I", "proto"]).args(&FILES[1..2]);
    // Without a real one on PATH.
    let bin = dir.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    for tool in ["sh", "dirname", "find", "sort", "xargs", "cat", "cksum", "cp"] {
        let real = ["/bin", "/usr/bin"].map(|dir| Path::new(dir).join(tool)).into_iter().find(|path| path.exists());
        std::os::unix::fs::symlink(real.unwrap(), bin.join(tool)).unwrap();
    }
    let output = protoc.env("PATH", &bin).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && !out.exists());
    assert!(said.contains("is of another release") && said.contains("there is no protoc on PATH"), "{said}");
}
