//! Processes that a test starts, and signals to them.

use std::{
    env, fs,
    process::{Child, Command},
};

use rustix::process::{Pid, Signal, kill_process};

/// Sends a signal to a child that was not waited for yet, so that its id cannot be another's.
#[track_caller]
pub fn signal_child(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).expect("a child that was not waited for can be signalled");
}

/// Sends a signal to the process with this id. Returns whether there was one.
pub fn signal(id: i32, signal: Signal) -> bool {
    Pid::from_raw(id).is_some_and(|pid| kill_process(pid, signal).is_ok())
}

/// The ids of a process's children.
pub fn children(parent: i32) -> Vec<i32> {
    fs::read_dir("/proc")
        .expect("Linux has /proc")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|id| parent_of(*id) == Some(parent))
        .collect()
}

/// Whether a child is stopped by a signal.
pub fn is_stopped(child: &Child) -> bool {
    stat(Pid::from_child(child).as_raw_nonzero().get()).is_some_and(|stat| stat.starts_with('T'))
}

/// Runs the body of a test in a process of its own, for what happens once in the life of a process. `name` is the test's.
pub fn in_a_process_of_its_own(name: &str, body: impl Future<Output = ()>) {
    if env::var(ALONE).is_ok_and(|alone| alone == name) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        return runtime.block_on(body);
    }
    let test = env::current_exe().expect("a test knows its own path");
    let output = Command::new(test).args(["--exact", name, "--nocapture"]).env(ALONE, name).output().unwrap();
    let shown = [output.stdout, output.stderr].concat();
    let shown = String::from_utf8_lossy(&shown);
    assert!(output.status.success() && shown.contains("1 passed"), "{name}: {shown}");
}

fn parent_of(id: i32) -> Option<i32> {
    stat(id)?.split(' ').nth(1)?.parse().ok()
}

/// `/proc/ID/stat` from the state on. The field before it is a name in parentheses that may itself hold any.
fn stat(id: i32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    Some(stat.rsplit_once(") ")?.1.to_owned())
}

const ALONE: &str = "TEST_ALONE";
