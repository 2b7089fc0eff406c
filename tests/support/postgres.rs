//! A PostgreSQL server that belongs to one test, to be stopped, killed and frozen.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use rustix::process::Signal;
use tempfile::TempDir;

use super::{free_port, process, required_env};

/// A server with a data folder of its own on a port of its own. Commits are in the log before they are acknowledged,
/// and survive a crash of the server though not of the machine. Dropped, it leaves nothing behind.
///
/// All calls block; they take from 0.1 to 2 s.
#[derive(Debug)]
pub struct Postgres {
    bin: PathBuf,
    folder: TempDir,
    port: u16,
    settings: Vec<String>,
}

impl Postgres {
    /// Starts a server.
    #[track_caller]
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts a server with settings such as `"max_connections=10"`, which outlast a restart.
    #[track_caller]
    pub fn start_with(settings: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let server = Self {
            bin: required_env("TEST_POSTGRES_BIN").into(),
            folder,
            port: free_port(),
            settings: settings.iter().map(ToString::to_string).collect(),
        };
        server.initialize();
        server.start_again();
        server
    }

    /// The URL of its database `postgres`.
    pub fn url(&self) -> String {
        self.url_through(self.address())
    }

    /// The URL of its database `postgres` by way of a proxy.
    pub fn url_through(&self, address: SocketAddr) -> String {
        format!("postgres://postgres@{address}/postgres")
    }

    /// Where it listens, for a proxy.
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// Stops it as a crash would: connections break, nothing is written any more, the log is recovered at the next start.
    #[track_caller]
    pub fn stop_immediate(&self) {
        run(self.pg_ctl().args(["-m", "immediate", "-w", "-t", "30", "stop"]));
    }

    /// Starts it after [`stop_immediate`](Self::stop_immediate), on the same port and data.
    #[track_caller]
    pub fn start_again(&self) {
        let mut options = format!(
            "-p {} -k {} -c listen_addresses=127.0.0.1 -c fsync=off",
            self.port,
            self.folder.path().display()
        );
        for setting in &self.settings {
            options.push_str(" -c ");
            options.push_str(setting);
        }
        let log = self.folder.path().join("postgres.log");
        run(self.pg_ctl().arg("-l").arg(log).args(["-w", "-t", "60", "-o", &options, "start"]));
    }

    /// Freezes every process of it: connections stay open and nobody answers.
    #[track_caller]
    pub fn pause(&self) {
        let postmaster = self.postmaster().expect("a paused server runs");
        // The postmaster first: after that there are no new children.
        process::signal(postmaster, Signal::STOP);
        for child in process::children(postmaster) {
            process::signal(child, Signal::STOP);
        }
    }

    /// Ends [`pause`](Self::pause).
    #[track_caller]
    pub fn resume(&self) {
        let postmaster = self.postmaster().expect("a paused server runs");
        for child in process::children(postmaster) {
            process::signal(child, Signal::CONT);
        }
        process::signal(postmaster, Signal::CONT);
    }

    fn initialize(&self) {
        if runs_as_root() {
            run(Command::new("chown").arg("postgres:").arg(self.folder.path()));
        }
        let mut initdb = self.server_command("initdb");
        initdb.args(["-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C.UTF-8", "--no-sync"]);
        run(initdb.arg("-D").arg(self.data()));
    }

    fn pg_ctl(&self) -> Command {
        let mut command = self.server_command("pg_ctl");
        command.arg("-D").arg(self.data());
        command
    }

    /// PostgreSQL refuses to run as root.
    fn server_command(&self, program: &str) -> Command {
        let program = self.bin.join(program);
        let mut command = if runs_as_root() {
            let mut command = Command::new("setpriv");
            command.args(["--reuid=postgres", "--regid=postgres", "--init-groups", "--"]).arg(program);
            command
        } else {
            Command::new(program)
        };
        command.current_dir(self.folder.path());
        command
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn postmaster(&self) -> Option<i32> {
        fs::read_to_string(self.data().join("postmaster.pid")).ok()?.lines().next()?.parse().ok()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if self.postmaster().is_some() {
            self.resume();
            let _ = self.pg_ctl().args(["-m", "immediate", "-w", "-t", "30", "stop"]).output();
        }
    }
}

fn runs_as_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The output goes to files: a server that inherited a pipe would keep its reader waiting.
#[track_caller]
fn run(command: &mut Command) {
    let folder = command.get_current_dir().map_or_else(std::env::temp_dir, Path::to_path_buf);
    let log = tempfile::NamedTempFile::new_in(folder).expect("a temporary file can be made");
    let file = || Stdio::from(log.reopen().expect("a temporary file can be opened"));
    let status = command.stdin(Stdio::null()).stdout(file()).stderr(file()).status();
    let succeeded = status.is_ok_and(|status| status.success());
    assert!(succeeded, "{command:?} failed: {}", fs::read_to_string(log.path()).unwrap_or_default());
}
