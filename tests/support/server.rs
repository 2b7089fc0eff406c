//! A server as a process, to be killed, frozen and ended: the example, or another program.

use std::{
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::Duration,
};

use rustix::process::Signal;
use tempfile::TempDir;

use super::{
    free_port,
    http::{RawResponse, exchange, request},
    process::{is_stopped, signal_child},
    wait_for,
};

/// A running server with a working folder of its own. Dropped, it is killed.
///
/// Starting and ending block, for some 50 ms.
#[derive(Debug)]
pub struct Server {
    program: Program,
    folder: TempDir,
    port: u16,
    variables: Vec<(String, String)>,
    process: Child,
}

/// What a server's process runs.
#[derive(Clone, Debug)]
pub struct Program {
    path: PathBuf,
    arguments: &'static [&'static str],
}

impl Program {
    /// A program that listens on `PORT` of the loopback interface and answers `GET /healthz` with 200.
    pub fn new(path: impl AsRef<Path>, arguments: &'static [&'static str]) -> Self {
        Self { path: path.as_ref().to_owned(), arguments }
    }
}

impl Server {
    /// Starts the example and waits until it answers. Without a database URL it keeps a SQLite file in its own folder.
    #[track_caller]
    pub fn start(database_url: Option<&str>, variables: &[(&str, &str)]) -> Self {
        Self::start_program(Program::new(executable("server"), &[]), database_url, variables)
    }

    /// Starts another program and waits until it answers.
    #[track_caller]
    pub fn start_program(program: Program, database_url: Option<&str>, variables: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let port = free_port();
        let all = database_url.map(|url| ("DATABASE_URL", url)).into_iter().chain(variables.iter().copied());
        let variables: Vec<_> = all.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        let process = spawn(&program, &folder, port, &variables);
        let mut server = Self { program, folder, port, variables, process };
        server.wait_until_healthy();
        server
    }

    /// Starts it anew after [`kill9`](Self::kill9) or [`terminate`](Self::terminate): same port, same folder, same
    /// variables.
    #[track_caller]
    pub fn start_again(&mut self) {
        self.process = spawn(&self.program, &self.folder, self.port, &self.variables);
        self.wait_until_healthy();
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.port).into()
    }

    /// The URL of this path.
    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address())
    }

    /// The SQLite file that it keeps if it was given no database URL.
    pub fn sqlite_file(&self) -> PathBuf {
        self.folder.path().join("payments.sqlite")
    }

    /// Everything it has written to its standard output and error.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Kills it and waits until it is gone.
    #[track_caller]
    pub fn kill9(&mut self) {
        self.process.kill().expect("the server was not waited for");
        self.process.wait().expect("a killed process ends");
    }

    /// Freezes it: connections stay open and nobody answers.
    #[track_caller]
    pub fn stop(&self) {
        signal_child(&self.process, Signal::STOP);
    }

    /// Lets it go on after [`stop`](Self::stop).
    #[track_caller]
    pub fn cont(&self) {
        signal_child(&self.process, Signal::CONT);
    }

    /// Whether it is frozen, by [`stop`](Self::stop) or by itself.
    pub fn is_stopped(&self) -> bool {
        is_stopped(&self.process)
    }

    /// Asks it to end, and does not wait.
    #[track_caller]
    pub fn ask_to_end(&self) {
        signal_child(&self.process, Signal::TERM);
    }

    /// Asks it to end, and waits for it.
    #[track_caller]
    pub fn terminate(&mut self) -> ExitStatus {
        self.ask_to_end();
        self.wait()
    }

    /// Waits until it has ended.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        wait_for("the server's end", || self.process.try_wait().expect("a child can be waited for"))
    }

    /// Sends `POST path` with a JSON body on a connection of its own: as the consumer acme unless the headers hold an
    /// `x-api-key`.
    pub async fn post(&self, path: &str, headers: &[(&str, &str)], json: &str) -> RawResponse {
        let mut all = vec![("content-type", "application/json"), ("connection", "close")];
        all.extend_from_slice(headers);
        exchange(self.address(), request("POST", path, &with_api_key(all), json)).await
    }

    /// Sends `POST path` with an idempotency key and a body that makes a charge.
    pub async fn charge(&self, path: &str, key: &str) -> RawResponse {
        self.post(path, &[("idempotency-key", key)], r#"{"amount":2000,"currency":"usd"}"#).await
    }

    /// Sends `GET path` on a connection of its own: as the consumer acme unless the headers hold an `x-api-key`.
    pub async fn get(&self, path: &str, headers: &[(&str, &str)]) -> RawResponse {
        let mut all = vec![("connection", "close")];
        all.extend_from_slice(headers);
        exchange(self.address(), request("GET", path, &with_api_key(all), "")).await
    }

    #[track_caller]
    fn wait_until_healthy(&mut self) {
        wait_for("the server's answer to /healthz", || {
            if let Some(status) = self.process.try_wait().expect("a child can be waited for") {
                panic!("the server ended with {status}: {}", self.log());
            }
            is_healthy(self.address()).then_some(())
        });
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("the server wrote:\n{}", self.log());
        }
    }
}

#[track_caller]
fn spawn(program: &Program, folder: &TempDir, port: u16, variables: &[(String, String)]) -> Child {
    let log = fs::OpenOptions::new().create(true).append(true).open(folder.path().join("log"));
    let log = log.expect("a file can be made in a temporary folder");
    let mut command = Command::new(&program.path);
    command
        .args(program.arguments)
        .current_dir(folder.path())
        .env_remove("DATABASE_URL")
        .env("PORT", port.to_string());
    command.envs(variables.iter().map(|(name, value)| (name, value)));
    command.stdin(Stdio::null()).stdout(log.try_clone().expect("a file can be shared")).stderr(log);
    command.spawn().expect("the server can be run")
}

/// The program of an example. Cargo puts tests into `target/PROFILE/deps` and examples into `target/PROFILE/examples`.
#[track_caller]
pub fn executable(example: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    let profile =
        test.parent().and_then(|deps| deps.parent()).expect("a test is in a folder of the target folder");
    let program = profile.join("examples").join(example);
    assert!(program.exists(), "{} is missing: run 'cargo build --example {example}'", program.display());
    program
}

fn is_healthy(address: SocketAddr) -> bool {
    let exchange = || {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")?;
        let mut response = Vec::new();
        stream.read_to_end(&mut response)?;
        std::io::Result::Ok(response)
    };
    exchange().is_ok_and(|response| response.starts_with(b"HTTP/1.1 200"))
}

fn with_api_key<'a>(mut headers: Vec<(&'a str, &'a str)>) -> Vec<(&'a str, &'a str)> {
    if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("x-api-key")) {
        headers.push(("x-api-key", "acme-key"));
    }
    headers
}
