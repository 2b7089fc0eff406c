//! One pass of the completer over abandoned requests.

use std::{pin::pin, sync::Arc};

use http::StatusCode;
use tokio::{task::JoinSet, time::timeout};

use crate::{
    error::StoreError,
    metrics,
    node::Node,
    recovery::{
        completer::{Completer, send::Passed},
        schedule::{EXTEND_AFTER, TERM},
    },
    redact::{TRACING_TARGET, subscribed},
    rejection::RejectionCode,
    stored::{
        record::{Fenced, Record, RecordState},
        request::{KeptRequest, RequestUpdate},
    },
};

/// The number of requests with each outcome in one pass of a [`Completer`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CompleterPass {
    /// Requests that were taken.
    pub taken: u64,
    /// Requests that are completed.
    pub completed: u64,
    /// Requests that are not completed and are sent again later.
    pub again: u64,
    /// Requests whose record is held until an intent is settled or an operator resolves it.
    pub held: u64,
    /// Requests that had lost their record: it had expired and was purged, or its key is used for
    /// another request.
    pub gone: u64,
    /// Requests that need the attention of an operator from now on.
    pub need_attention: u64,
    /// Requests that met an error of the store and are taken again later.
    pub failed: u64,
}

/// The outcome of one request.
#[derive(Debug)]
enum Fate {
    Completed,
    SendAgain(String),
    /// The request was not sent, or an attempt is running.
    Later(String),
    Held,
    Gone,
    NeedsAttention(String),
}

impl Completer {
    /// Sends abandoned requests again, at most a batch.
    pub(crate) async fn pass(&self, node: &Arc<Node>) -> Result<CompleterPass, StoreError> {
        let (mut counts, mut left) = (CompleterPass::default(), self.batch);
        let (mut under_way, mut failure) = (JoinSet::new(), None);
        loop {
            let running = u32::try_from(under_way.len()).unwrap_or(u32::MAX);
            let free = self.concurrency.saturating_sub(running).min(left);
            if free > 0 && !node.tasks.is_draining() {
                // As many as can begin now: a request that waited here for the pause would be taken twice.
                let taken = self.take(node, free).await.unwrap_or_else(|error| {
                    failure = Some(error);
                    Vec::new()
                });
                // Fewer than asked for: none is left that is due.
                left = if taken.len() < free as usize { 0 } else { left - free };
                for request in taken {
                    counts.taken += 1;
                    let (this, node) = (self.clone(), Arc::clone(node));
                    let tasks = node.tasks.clone();
                    // Tracked, so that draining waits for it.
                    let work = subscribed(async move { this.complete(&node, &request).await });
                    under_way.spawn(tasks.track(work));
                }
            }
            match under_way.join_next().await {
                None => return failure.map_or(Ok(counts), Err),
                Some(ended) => counts.add(ended.ok().flatten().as_ref()),
            }
        }
    }

    async fn take(&self, node: &Arc<Node>, limit: u32) -> Result<Vec<KeptRequest>, StoreError> {
        let (recovery, pause) = (node.recovery()?, self.backoff.first().min(TERM));
        node.tasks.run_to_end(async move { recovery.take_abandoned(limit, pause).await }).await
    }

    /// Sends one request and records the outcome. `None` after an error of the store: the request
    /// is then taken again later.
    async fn complete(&self, node: &Arc<Node>, request: &KeptRequest) -> Option<Fate> {
        let completed = match self.fate_while_taken(node, request).await {
            Ok(fate) => self.note(node, request, &fate).await.map(|()| fate),
            Err(error) => Err(error),
        };
        completed
            .inspect_err(|error| {
                let error = error as &dyn std::error::Error;
                tracing::warn!(
                    target: TRACING_TARGET, consumer = %request.consumer, record = %request.record_id, error,
                    "an abandoned request could not be completed: the store failed; trying again later"
                );
            })
            .ok()
    }

    /// Sends a request, and keeps it from other nodes until its outcome is known. Its record does
    /// that only while the attempt runs.
    async fn fate_while_taken(&self, node: &Arc<Node>, request: &KeptRequest) -> Result<Fate, StoreError> {
        let mut fate = pin!(self.fate(node, request));
        loop {
            if let Ok(fate) = timeout(EXTEND_AFTER, &mut fate).await {
                return fate;
            }
            let (recovery, record, tries) = (node.recovery()?, request.record_id, request.tries);
            let extend = RequestUpdate::SendAgain { after: TERM, tried: true };
            let extended = node
                .tasks
                .run_to_end(async move { recovery.update_request(record, Some(tries), &extend).await })
                .await;
            // After an error the term may run out. Then another node sends the request as well, and
            // its record lets one attempt run.
            if let Ok(Fenced::Lost) = extended {
                return fate.await;
            }
        }
    }

    async fn fate(&self, node: &Arc<Node>, request: &KeptRequest) -> Result<Fate, StoreError> {
        // Taking counts as a try: the last one was taken before, and its outcome was never recorded.
        if request.tries > self.max_tries {
            let what = format!("sent {} times, and the outcome of the last try is unknown", self.max_tries);
            return Ok(Fate::NeedsAttention(what));
        }
        if node.tasks.is_draining() {
            return Ok(Fate::Later("the server is shutting down".to_owned()));
        }
        // Before it is sent: a failure would release and delete the record, and with it this request.
        let (recovery, kept) = (node.recovery()?, request.clone());
        let keep = async move { recovery.retain_record(&kept.consumer, &kept.key, kept.record_id).await };
        if node.tasks.run_to_end(keep).await? == Fenced::Lost {
            let record = record_of(node, request).await?;
            return Ok(ended(record.as_ref()).unwrap_or(Fate::Later("its record was changed".to_owned())));
        }
        // The record says what happened, and not the answer, which a layer outside may have changed.
        let passed = self.pass_on(node, request).await;
        let record = record_of(node, request).await?;
        Ok(ended(record.as_ref()).unwrap_or_else(|| self.not_completed(request, record.as_ref(), passed)))
    }

    /// Decides about a request whose record is still in progress.
    fn not_completed(&self, request: &KeptRequest, record: Option<&Record>, passed: Passed) -> Fate {
        let (passage, status, what) = match passed {
            Passed::Never(what) => return Fate::NeedsAttention(what),
            Passed::NotYet(what) => return self.again_or_not(request, what),
            Passed::Through { passage, status, what } => (passage, status, what),
        };
        if !passage.was_reached() && !status.is_some_and(is_turned_away) {
            let unguarded = "no idempotency layer guards its route any more";
            return Fate::NeedsAttention(format!(
                "{unguarded}: it may have been performed without one; {what}"
            ));
        }
        match passage.refusal() {
            Some(RejectionCode::KeyReused) => {
                let what = "its fingerprint differs from the one of its record";
                Fate::NeedsAttention(what.to_owned())
            }
            // It outlived the time-out: sent again now, it would only be refused with 409.
            _ if is_owned(record) => Fate::Later("an attempt is running".to_owned()),
            Some(RejectionCode::ShuttingDown) => Fate::Later(what),
            Some(code) => self.again_or_not(request, format!("{what}: {code}")),
            None if passage.was_reached() && status.is_some_and(|status| status.is_client_error()) => {
                let (what, status) = ("answered before any intent or phase, and not stored", shown(status));
                Fate::NeedsAttention(format!("{what}: it may lack a header, see KeptRequests ({status})"))
            }
            None => self.again_or_not(request, what),
        }
    }

    fn again_or_not(&self, request: &KeptRequest, what: String) -> Fate {
        match request.tries < self.max_tries {
            true => Fate::SendAgain(what),
            false => {
                Fate::NeedsAttention(format!("not completed after {} tries; the last: {what}", request.tries))
            }
        }
    }

    async fn note(&self, node: &Arc<Node>, request: &KeptRequest, fate: &Fate) -> Result<(), StoreError> {
        let (consumer, record, tries) = (&request.consumer, request.record_id, request.tries);
        let update = match fate {
            // Nothing to record: a request is not taken while its record is held.
            Fate::Held => return Ok(()),
            Fate::Completed | Fate::Gone => RequestUpdate::Done,
            Fate::SendAgain(what) => {
                let pause = self.backoff.after(tries);
                tracing::warn!(
                    target: TRACING_TARGET, %consumer, %record, tries, what, ?pause,
                    "an abandoned request was not completed; it is sent again later"
                );
                RequestUpdate::SendAgain { after: pause, tried: true }
            }
            Fate::Later(what) => {
                tracing::debug!(
                    target: TRACING_TARGET, %consumer, %record, tries, what,
                    "an abandoned request was not sent, or is running; it is looked at again later"
                );
                RequestUpdate::SendAgain { after: self.backoff.first(), tried: false }
            }
            Fate::NeedsAttention(what) => {
                tracing::error!(
                    target: TRACING_TARGET, %consumer, %record, tries, what,
                    "an abandoned request needs attention: an operator must look at it"
                );
                RequestUpdate::NeedsAttention(what.clone())
            }
        };
        if matches!(fate, Fate::Completed) {
            tracing::info!(
                target: TRACING_TARGET, %consumer, %record, tries,
                "an abandoned request is completed"
            );
        }
        let recovery = node.recovery()?;
        node.tasks
            .run_to_end(async move { recovery.update_request(record, Some(tries), &update).await })
            .await
            .map(drop)
    }
}

impl CompleterPass {
    fn add(&mut self, fate: Option<&Fate>) {
        let (count, outcome) = match fate {
            Some(Fate::Completed) => (&mut self.completed, "completed"),
            Some(Fate::SendAgain(_) | Fate::Later(_)) => (&mut self.again, "again"),
            Some(Fate::Held) => (&mut self.held, "held"),
            Some(Fate::Gone) => (&mut self.gone, "gone"),
            Some(Fate::NeedsAttention(_)) => (&mut self.need_attention, "attention"),
            None => (&mut self.failed, "failed"),
        };
        *count += 1;
        metrics::sent_again(outcome);
    }
}

/// The record that the request was kept for; `None` if it is gone.
async fn record_of(node: &Arc<Node>, request: &KeptRequest) -> Result<Option<Record>, StoreError> {
    let (store, kept) = (Arc::clone(&node.store), request.clone());
    let found = node.tasks.run_to_end(async move { store.get(&kept.consumer, &kept.key).await }).await?;
    Ok(found.filter(|record| record.id == request.record_id))
}

/// The outcome of a request, if its record says so.
fn ended(record: Option<&Record>) -> Option<Fate> {
    match record.map(|record| &record.state) {
        None => Some(Fate::Gone),
        Some(RecordState::Completed { .. }) => Some(Fate::Completed),
        Some(RecordState::Held) => Some(Fate::Held),
        Some(RecordState::InProgress { .. }) => None,
    }
}

fn is_owned(record: Option<&Record>) -> bool {
    let state = record.map(|record| &record.state);
    matches!(state, Some(RecordState::InProgress { lease_remaining }) if !lease_remaining.is_zero())
}

/// Statuses with which layers outside the idempotency layer answer a request that they did not pass
/// on.
fn is_turned_away(status: StatusCode) -> bool {
    matches!(status.as_u16(), 401 | 403 | 407 | 408 | 413 | 421 | 425 | 429 | 503)
}

fn shown(status: Option<StatusCode>) -> String {
    status.map_or_else(|| "no answer".to_owned(), |status| status.to_string())
}
