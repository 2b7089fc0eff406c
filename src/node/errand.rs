//! Calls of the store whose caller may stop waiting, and must then leave nothing behind.

use std::{future::Future, time::Duration};

use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};

use super::RETRY;
use crate::error::{StoreError, StoreErrorKind};

/// Repeats a call while its reply is lost and its caller waits. Returns the last outcome, and
/// `true` if an earlier try may still be carried out after it.
pub(crate) async fn repeat_while<T, F: Future<Output = Result<T, StoreError>>>(
    is_awaited: impl Fn() -> bool,
    mut call: impl FnMut() -> F,
) -> (Result<T, StoreError>, bool) {
    let (mut tries, mut may_arrive_late) = (1, false);
    loop {
        let outcome = call().await;
        let ambiguous = matches!(&outcome, Err(error) if error.kind() == StoreErrorKind::Ambiguous);
        // Once a try may have arrived, a later one that certainly failed does not make it undone.
        may_arrive_late |= ambiguous;
        if !ambiguous || !is_awaited() {
            return (outcome, may_arrive_late);
        }
        sleep(RETRY.after(tries)).await;
        tries += 1;
    }
}

/// Waits at most `limit` for an answer. After `None`, it cannot be sent any more.
pub(crate) async fn receive<T>(mut receiver: oneshot::Receiver<T>, limit: Duration) -> Option<T> {
    if let Ok(answer) = timeout(limit, &mut receiver).await {
        return answer.ok();
    }
    // Closed first: an answer is either seen here, or its sender learns that it is not taken.
    receiver.close();
    receiver.try_recv().ok()
}
