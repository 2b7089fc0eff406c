//! The same storm over a crate whose fence was taken away must find double effects, and the same lost answers over a crate
//! that forgets a record on which an intent hangs must find double transfers: a harness that cannot see the fault proves
//! nothing.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use tokio::task::block_in_place;

use crate::{Random, Run, SERVE, report::Check, storm::Storm, support::server::Program, upstream};

pub async fn run(run: &Run) {
    let source = block_in_place(Source::copy);
    without_fence(run, block_in_place(|| source.build(&WITHOUT_FENCE))).await;
    always_deleting(run, block_in_place(|| source.build(&ALWAYS_DELETING))).await;
}

/// Releasing deletes every record, also one on which an intent hangs: the retry gets another upstream key.
async fn always_deleting(run: &Run, program: Program) {
    let check = Check::new("mutant: with a release that always deletes, double transfers are found");
    let (found, payouts) = upstream::doubles(program, run.count(20)).await;
    println!("mutant: {found} of {payouts} payouts were made twice");
    check.that(found > 0, "-", "a harness that cannot see the fault proves nothing");
    check.print();
}

/// Every attempt may complete, release and lock every record.
async fn without_fence(run: &Run, program: Program) {
    let storm = Storm {
        keys: run.count(200),
        clients_per_key: 5,
        span: Duration::from_secs(if run.full { 60 } else { 10 }),
        kills: 0,
        freezes: run.count(5),
        crashes: 0,
        freezes_before_begin: run.count(40),
        slow_handlers: run.count(40),
    };
    let check = Check::new("mutant: without the fence, double effects are found");
    let mut random = run.random("mutant");
    let mut found = 0;
    for _ in 0..ROUNDS {
        let audit = storm.rage(program.clone(), Random(random.below(u64::MAX)), None).await;
        found += audit.double_effects;
        println!("mutant: {} of {} keys have a double effect", audit.double_effects, audit.keys.len());
        if found > 0 {
            break;
        }
    }
    check.that(found > 0, "-", "a harness that cannot see the fault proves nothing");
    check.print();
}

/// What is wrong with a crate.
struct Mutation {
    name: &'static str,
    text: &'static str,
    replacement: &'static str,
}

/// A copy of the crate, beside the target folder's own contents.
struct Source {
    crate_root: PathBuf,
    target: PathBuf,
}

impl Source {
    fn copy() -> Self {
        let program = std::env::current_exe().expect("a program knows its own path");
        let profile = program.ancestors().nth(2).expect("cargo puts tests into PROFILE/deps");
        let folder = profile.with_file_name("mutant");
        let source = Self { crate_root: folder.join("source"), target: folder.join("target") };
        let _ = fs::remove_dir_all(&source.crate_root);
        fs::create_dir_all(&source.crate_root).expect("the target folder can be written to");
        lend_dependencies(profile, &source.target.join("debug"));
        let origin = Path::new(env!("CARGO_MANIFEST_DIR"));
        copy(
            [
                "Cargo.toml",
                "Cargo.lock",
                "README.md",
                "assets",
                "src",
                "tests",
                "benches",
                "examples",
                "migrations",
            ]
            .map(|name| origin.join(name)),
            &source.crate_root,
        );
        source
    }

    /// Builds the crate with this mutation alone, as this program was built.
    fn build(&self, mutation: &Mutation) -> Program {
        let Mutation { name, text, replacement } = mutation;
        let (file, sane) = self.find(text);
        fs::write(&file, sane.replace(text, replacement)).expect("the copy can be written");
        let built = cargo(&self.crate_root, &self.target);
        fs::write(&file, sane).expect("the copy can be written");
        let program = self.target.with_file_name(name);
        fs::copy(built, &program).expect("the program can be copied");
        Program::new(program, &[SERVE])
    }

    /// The one file of the stores that holds this text, which it holds once.
    fn find(&self, text: &str) -> (PathBuf, String) {
        let mut files = Vec::new();
        let mut folders = vec![self.crate_root.join("src/store")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).expect("the copy can be read") {
                let path = entry.expect("the copy can be read").path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let source = fs::read_to_string(&path).expect("the source can be read");
                    files.extend(source.matches(text).map(|_| (path.clone(), source.clone())));
                }
            }
        }
        assert_eq!(files.len(), 1, "{text} is not there once: change the mutant too");
        files.remove(0)
    }
}

/// What was compiled for this program need not be compiled again. If it cannot be linked it is.
fn lend_dependencies(profile: &Path, target: &Path) {
    if profile.ends_with("debug") && fs::create_dir_all(target).is_ok() && !target.join("deps").exists() {
        let folders = ["deps", "build", ".fingerprint"].map(|name| profile.join(name));
        let _ =
            Command::new("cp").args(["-al", "--"]).args(folders).arg(target).stderr(Stdio::null()).status();
    }
}

fn cargo(source: &Path, target: &Path) -> PathBuf {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args([
        "test",
        "--no-run",
        "--test",
        "torture",
        "--message-format",
        "json",
        "--offline",
        "--target-dir",
    ]);
    command.arg(target).current_dir(source).env("CARGO_INCREMENTAL", "0").stdin(Stdio::null());
    let output = command.stderr(Stdio::inherit()).output().expect("cargo can be run");
    assert!(output.status.success(), "the mutant does not compile");
    let messages = String::from_utf8(output.stdout).expect("cargo's messages are UTF-8");
    let artifacts = messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let executable =
        artifacts.filter_map(|artifact| Some(artifact["executable"].as_str()?.into())).next_back();
    executable.expect("cargo names the program it has built")
}

fn copy(from: impl IntoIterator<Item = PathBuf>, to: &Path) {
    let status = Command::new("cp").args(["-a", "--"]).args(from).arg(to).status();
    assert!(status.is_ok_and(|status| status.success()), "the sources can be copied");
}

const WITHOUT_FENCE: Mutation = Mutation {
    name: "without-fence",
    text: r#"("mine", "({r}.attempt = :attempt AND {r}.state IN ('in_progress', 'held'))")"#,
    // Every statement has the attempt as a parameter, whose type has to be known.
    replacement: r#"("mine", "({r}.attempt = :attempt OR TRUE)")"#,
};
const ALWAYS_DELETING: Mutation =
    Mutation { name: "always-deleting", text: "{mine} AND NOT {retained}", replacement: "{mine}" };
const ROUNDS: usize = 5;
