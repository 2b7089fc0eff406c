//! Tasks that share out what there is to do.

use std::{collections::VecDeque, sync::Mutex};

use tokio::task::JoinSet;

/// Cases that are still to be run, each with its number.
#[derive(Debug)]
pub struct Todo<T>(Mutex<VecDeque<(T, usize)>>);

impl<T: Copy> Todo<T> {
    /// Each of the cases so many times.
    pub fn new(cases: impl IntoIterator<Item = T>, times: usize) -> Self {
        let all = cases.into_iter().flat_map(|case| (0..times).map(move |number| (case, number)));
        Self(Mutex::new(all.collect()))
    }

    pub fn take(&self) -> Option<(T, usize)> {
        self.0.lock().unwrap().pop_front()
    }
}

/// Runs that many of the tasks at once, to their end.
pub async fn run<F>(count: usize, lane: impl Fn() -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    (0..count).map(|_| lane()).collect::<JoinSet<_>>().join_all().await;
}
