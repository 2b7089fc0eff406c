//! The verdict on a handler's end: one part for its record, one for its client.

use std::{
    any::Any,
    error::Error,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use bytes::Bytes;
use http::{Extensions, HeaderMap, Response, StatusCode, header, response::Parts};
use http_body::Body;
use tower::load_shed::error::Overloaded;

use crate::{
    attempt::Facts,
    error::BoxError,
    layer::{
        answer::{refused, rendered, replay, response_of_record},
        body::ResponseBody,
        buffer::{Buffered, Collected},
        closing::{Closed, Outcome},
        future::Answer,
        grpc,
        reach::Reach,
        settings::Settings,
    },
    node::ends::End,
    policy::Directive,
    redact::TRACING_TARGET,
    rejection::{Rejection, RejectionCode, render_again},
    store::transaction::{TransactionErrorKind, TransactionUsage},
    stored::response::{Representation, StoredBody, StoredResponse},
};

/// A response whose body was collected as far as possible, or the error of the inner service.
pub(crate) type Performed<B, E> = Result<(Parts, Collected<B>), E>;

/// The end of the handler's task.
#[expect(
    clippy::large_enum_variant,
    reason = "it is made and taken apart once, and the large variant is the rule"
)]
pub(crate) enum HandlerEnd<B, E> {
    Performed(Performed<B, E>),
    Panicked,
    Cancelled(Cause),
}

/// The reason why a handler is cancelled.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub(crate) enum Cause {
    #[error("it runs longer than max_execution")]
    TooLong,
    #[error("its transaction is open for longer than TransactionOptions::with_time_limit")]
    TransactionOverdue,
}

/// The outcome that is written down, and the verdict that the client gets then.
pub(crate) struct Judged<B, E> {
    pub(crate) outcome: Outcome,
    pub(crate) verdict: Verdict<B, E>,
}

/// The client's part of a judgement.
pub(crate) enum Verdict<B, E> {
    /// The handler's response or error.
    Passed(Answer<B, E>),
    /// The stored response, with the extensions of the handler's.
    Stored(StoredResponse, Extensions),
    /// A refusal instead of the handler's answer.
    Refused(Rejection),
}

/// Judges the end of one handler.
#[derive(Clone)]
pub(crate) struct Judge {
    pub(crate) settings: Arc<Settings>,
    pub(crate) facts: Arc<Facts>,
    /// A completer has sent the request.
    pub(crate) resent: bool,
    pub(crate) reach: Arc<Reach>,
    /// The request is gRPC.
    pub(crate) is_grpc: bool,
}

impl Judge {
    /// Judges a handler's end. Calls closures of the application, the policy and the renderer,
    /// which may panic.
    pub(crate) fn judge<B, E: 'static>(&self, ended: HandlerEnd<B, E>) -> Judged<B, E> {
        let judge = || {
            if let Some(rejection) = self.facts.progress.held() {
                drop(ended);
                return Judged { outcome: End::Hold.into(), verdict: Verdict::Refused(rejection) };
            }
            if matches!(ended, HandlerEnd::Performed(Ok(_)))
                && let Some(rejection) = self.facts.runs.second()
            {
                drop(ended);
                return self.without_result(rejection);
            }
            if matches!(ended, HandlerEnd::Performed(Ok(_))) && self.transaction_is_in_use() {
                // If the body of the response has the transaction, this gives it back.
                drop(ended);
                return self.transaction_still_in_use();
            }
            self.judge_end(ended)
        };
        catch_unwind(AssertUnwindSafe(judge)).unwrap_or_else(|_| {
            self.without_result(Rejection::new(
                RejectionCode::Internal,
                "The server failed after the request was performed. Send the request again with the same \
                 key.",
            ))
        })
    }

    fn judge_end<B, E: 'static>(&self, ended: HandlerEnd<B, E>) -> Judged<B, E> {
        match ended {
            HandlerEnd::Performed(Ok((mut parts, mut body))) => {
                // Before the response is judged: an upstream's refusal is stored as the client sees
                // it.
                let is_body =
                    |rendered: &Bytes| matches!(&body, Collected::Whole(whole) if whole.data == *rendered);
                if let Some(data) = render_again(&mut parts, &*self.settings.renderer, is_body) {
                    body = Collected::Whole(Buffered { data, trailers: None });
                }
                self.judge_response(parts, body)
            }
            HandlerEnd::Performed(Err(error)) => {
                let end = match self.is_load_shed(&error) {
                    true => End::Release,
                    false => self.end_without_result(),
                };
                Judged { outcome: end.into(), verdict: Verdict::Passed(Err(error)) }
            }
            HandlerEnd::Panicked => self.without_result(Rejection::new(
                RejectionCode::HandlerPanicked,
                "The server failed while it performed the request. Send the request again with the same key, \
                 never with a new one.",
            )),
            HandlerEnd::Cancelled(cause) => self.without_result(cause.rejection()),
        }
    }

    fn judge_response<B, E>(&self, mut parts: Parts, body: Collected<B>) -> Judged<B, E> {
        // It belongs to replays alone.
        parts.headers.remove(&self.settings.replay_marker);
        let representation = parts.extensions.remove::<Representation>();
        let status = grpc::judged_status(&parts, &body, self.is_grpc);
        let (body, stored) = match body {
            Collected::Whole(Buffered { data, trailers }) => {
                (ResponseBody::buffered(data.clone(), trailers.clone()), StoredBody::Kept { data, trailers })
            }
            Collected::Partial(frames, rest) => (ResponseBody::resumed(frames, rest), StoredBody::NotKept),
            Collected::Broken(error) => return self.broken_off(&*error),
        };
        let status = match status {
            Ok(status) => status,
            Err(missing) => return self.broken_off(&missing),
        };
        if let Some(end) = self.end_unstored(&parts, status) {
            return Judged {
                outcome: end.into(),
                verdict: Verdict::Passed(Ok(Response::from_parts(parts, body))),
            };
        }
        if let Some(representation) = representation {
            return self.judge_represented(parts, representation);
        }
        let first = StoredResponse::of(&parts, stored);
        let outcome = self.outcome_stored(&first, status);
        let verdict = match first.body == StoredBody::NotKept {
            true => Verdict::Passed(Ok(Response::from_parts(parts, body))),
            false => Verdict::Stored(first, parts.extensions),
        };
        Judged { outcome, verdict }
    }

    fn broken_off<B, E>(&self, error: &(dyn Error + 'static)) -> Judged<B, E> {
        self.facts.log_failure(error, "the response broke off");
        self.without_result(Rejection::new(
            RejectionCode::ResponseIncomplete,
            "The server's response broke off. Send the request again with the same key.",
        ))
    }

    fn judge_represented<B, E>(&self, parts: Parts, representation: Representation) -> Judged<B, E> {
        let too_large = representation.data().len() > self.settings.response_body_limit;
        let first = StoredResponse::represented(parts.status, representation);
        let outcome = match too_large {
            true => self
                .outcome_stored(&StoredResponse { body: StoredBody::NotKept, ..first.clone() }, parts.status),
            false => self.outcome_stored(&first, parts.status),
        };
        Judged { outcome, verdict: Verdict::Stored(first, parts.extensions) }
    }

    fn transaction_is_in_use(&self) -> bool {
        let transaction = self.facts.transaction.as_ref();
        transaction.is_some_and(|transaction| transaction.usage() == TransactionUsage::InUse)
    }

    fn transaction_still_in_use<B, E>(&self) -> Judged<B, E> {
        tracing::error!(
            target: TRACING_TARGET, consumer = %self.facts.attempt.consumer, attempt = %self.facts.attempt.id,
            "the handler returned without giving its transaction back: it is in a task, a static or the \
             response's body"
        );
        let rejection = TransactionErrorKind::InUse.rejection();
        Judged { outcome: End::Release.into(), verdict: Verdict::Refused(rejection) }
    }

    /// The response is passed on as it comes: it is a stream, or its head tells that it is not
    /// stored.
    pub(crate) fn is_streamed<B: Body>(&self, parts: &Parts, body: &B) -> bool {
        if has_streaming_type(&parts.headers) {
            return body.size_hint().exact().is_none();
        }
        // A refusal is rendered again when all of it is known, and a body may give the transaction
        // back.
        if parts.extensions.get::<Rejection>().is_some() || self.transaction_is_in_use() {
            return false;
        }
        if parts.extensions.get::<Directive>().is_none() && grpc::ends_with_status(parts) {
            return false;
        }
        // The judgement that follows asks a policy that panics again.
        let directive = catch_unwind(AssertUnwindSafe(|| self.directive(parts, parts.status)));
        directive.is_ok_and(|directive| directive != Directive::Store)
    }

    /// The end of an attempt whose response is not stored. `None` if it is.
    fn end_unstored(&self, parts: &Parts, status: StatusCode) -> Option<End> {
        let directive = self.directive(parts, status);
        let Facts { settings, attempt, attempt_number, .. } = &*self.facts;
        tracing::debug!(
            target: TRACING_TARGET, consumer = %attempt.consumer, key = %settings.shown(&attempt.key),
            attempt = %attempt.id, attempt_number, status = status.as_u16(), ?directive, "performed"
        );
        if directive != Directive::Store {
            self.warn_of_rollback(parts, status, directive);
        }
        match directive {
            Directive::Store => None,
            Directive::Release => Some(End::Release),
            Directive::Hold => Some(End::Hold),
        }
    }

    fn directive(&self, parts: &Parts, status: StatusCode) -> Directive {
        let directive = parts.extensions.get::<Directive>().copied();
        if let Some(rejection) = parts.extensions.get::<Rejection>() {
            return self.directive_of_refusal(rejection, directive);
        }
        if let Some(directive) = directive {
            return directive;
        }
        if self.may_lack_a_header(status) || !self.is_used() && self.reach.is_turned_away(status) {
            return Directive::Release;
        }
        self.settings.policy.directive(status)
    }

    /// A refusal, of this layer or of one inside it, is never stored.
    fn directive_of_refusal(&self, rejection: &Rejection, directive: Option<Directive>) -> Directive {
        // The layer inside has run a handler, which has no result.
        let ran = rejection.code().is_end_without_result() && matches!(self.end_without_result(), End::Hold);
        match directive {
            Some(Directive::Hold) => Directive::Hold,
            None if ran => Directive::Hold,
            Some(_) | None => Directive::Release,
        }
    }

    /// Warns of a success whose writes are rolled back, because it is not stored.
    fn warn_of_rollback(&self, parts: &Parts, status: StatusCode, directive: Directive) {
        let refused = parts.extensions.get::<Rejection>().is_some();
        if self.uses_transaction() && !refused && (status.is_success() || status.is_redirection()) {
            let Facts { settings, attempt, .. } = &*self.facts;
            tracing::warn!(
                target: TRACING_TARGET, consumer = %attempt.consumer, key = %settings.shown(&attempt.key),
                attempt = %attempt.id, status = status.as_u16(), ?directive,
                "a success is answered and not stored: what its handler wrote through Tx is rolled back"
            );
        }
    }

    /// Not every header of a request is kept. If a request that was sent again gets no further than
    /// to a client error, a header may be missing that the client would have sent: the error is no
    /// result.
    fn may_lack_a_header(&self, status: StatusCode) -> bool {
        self.resent && status.is_client_error() && !self.facts.progress.has_begun()
    }

    /// The handler has used an intent, a phase or the transaction.
    fn is_used(&self) -> bool {
        self.facts.progress.has_begun() || self.uses_transaction()
    }

    fn uses_transaction(&self) -> bool {
        let transaction = self.facts.transaction.as_ref();
        transaction.is_some_and(|transaction| transaction.usage() != TransactionUsage::Unused)
    }

    /// A load shed inside the layer has turned the request away.
    fn is_load_shed<E: 'static>(&self, error: &E) -> bool {
        let error = error as &dyn Any;
        let is_overloaded = error.is::<Overloaded>()
            || error.downcast_ref::<BoxError>().is_some_and(|error| error.is::<Overloaded>());
        // A handler may have met the error in a client of its own.
        is_overloaded && self.reach.was_answered_immediately() && !self.is_used()
    }

    fn outcome_stored(&self, response: &StoredResponse, status: StatusCode) -> Outcome {
        if status.is_success() {
            self.facts.warn_of_open_intents();
        }
        let keeps_writes = status.is_success()
            || status.is_redirection()
            || status.is_client_error() && self.settings.attempts.transactions.keep_writes_of_client_errors;
        let codec = &self.facts.node.codec;
        let encoded = match &*self.settings.headers_not_kept {
            [] => codec.response(response),
            names => {
                let mut kept = response.clone();
                kept.remove_headers(names);
                codec.response(&kept)
            }
        };
        Outcome { end: End::Complete(encoded), keeps_writes }
    }

    fn without_result<B, E>(&self, rejection: Rejection) -> Judged<B, E> {
        let end = self.end_without_result();
        let held = matches!(end, End::Hold);
        Judged { outcome: end.into(), verdict: Verdict::Refused(rejection.final_if(held)) }
    }

    fn end_without_result(&self) -> End {
        self.settings.attempts.end_without_result()
    }

    /// The answer to a client whose handler was cancelled and runs on.
    pub(crate) fn refuse_cancelled<B>(&self, cause: Cause) -> Response<ResponseBody<B>> {
        let held = matches!(self.end_without_result(), End::Hold);
        refused(&self.settings, cause.rejection().final_if(held))
    }

    /// The answer to the client, now that the attempt has ended.
    pub(crate) async fn answer<B, E>(&self, closed: Closed, verdict: Verdict<B, E>) -> Answer<B, E> {
        match (closed, verdict) {
            (Closed::AsJudged, Verdict::Passed(answer)) => answer,
            (Closed::AsJudged, Verdict::Stored(response, extensions)) => {
                Ok(self.first_response(response, extensions).await)
            }
            (Closed::AsJudged, Verdict::Refused(rejection)) | (Closed::Refused(rejection), _) => {
                Ok(refused(&self.settings, rejection))
            }
            (Closed::Superseded(record), _) => {
                Ok(match response_of_record(&self.facts.node, &self.settings, &record).await {
                    Ok(stored) => replay(&self.settings, stored),
                    Err(rejection) => refused(&self.settings, rejection),
                })
            }
        }
    }

    async fn first_response<B>(
        &self,
        response: StoredResponse,
        extensions: Extensions,
    ) -> Response<ResponseBody<B>> {
        let attempt = &self.facts.attempt;
        match rendered(&self.settings, &attempt.consumer, &attempt.key, response).await {
            Ok(response) => {
                let mut response = response.into_response();
                *response.extensions_mut() = extensions;
                response
            }
            Err(rejection) => refused(&self.settings, rejection),
        }
    }
}

impl Cause {
    fn rejection(self) -> Rejection {
        match self {
            Self::TooLong => Rejection::new(
                RejectionCode::MaxExecutionExceeded,
                "The request took too long and was cancelled; a part of it may have been performed. Send it \
                 again with the same key, never with a new one.",
            ),
            Self::TransactionOverdue => Rejection::new(
                RejectionCode::TransactionLost,
                "The transaction of the request was open for too long. Send the request again with the same \
                 key to learn whether it was performed.",
            ),
        }
    }
}

/// The content type is one whose parts are made one by one, and read so.
fn has_streaming_type(headers: &HeaderMap) -> bool {
    let content_type = headers.get(header::CONTENT_TYPE).map_or(&[][..], |value| value.as_bytes());
    let essence = content_type.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii();
    STREAMING_TYPES.iter().any(|streaming| essence.eq_ignore_ascii_case(streaming.as_bytes()))
}

const STREAMING_TYPES: [&str; 9] = [
    "text/event-stream",
    "application/x-ndjson",
    "application/ndjson",
    "application/jsonl",
    "application/x-jsonlines",
    "application/json-seq",
    "application/geo+json-seq",
    "application/stream+json",
    "multipart/x-mixed-replace",
];
