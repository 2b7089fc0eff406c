//! gRPC: results are judged by their `grpc-status`, and refusals are answered as one. The docs of
//! [`ResultPolicy`](crate::ResultPolicy) have the table.

use std::fmt::Write;

use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header, response::Parts};

use crate::{
    layer::{
        body::ResponseBody,
        buffer::{Buffered, Collected},
    },
    rejection::{Rejection, RejectionCode},
};

/// The protocol of a message, by its content type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    Grpc,
    Web,
    /// The body is in Base64.
    WebText,
}

impl Protocol {
    fn of(headers: &HeaderMap) -> Option<Self> {
        let (prefix, rest) = headers.get(header::CONTENT_TYPE)?.as_bytes().split_at_checked(GRPC.len())?;
        if !prefix.eq_ignore_ascii_case(GRPC) {
            return None;
        }
        let end = rest.iter().position(|byte| matches!(byte, b'+' | b';')).unwrap_or(rest.len());
        match rest[..end].trim_ascii().to_ascii_lowercase().as_slice() {
            b"" => Some(Self::Grpc),
            b"-web" => Some(Self::Web),
            b"-web-text" => Some(Self::WebText),
            _ => None,
        }
    }
}

/// The content type of a request, if its answer must be a gRPC status.
pub(crate) fn content_type(headers: &HeaderMap) -> Option<HeaderValue> {
    Protocol::of(headers)?;
    headers.get(header::CONTENT_TYPE).cloned()
}

/// The head of a response does not tell its result: the trailers do.
pub(crate) fn ends_with_status(parts: &Parts) -> bool {
    Protocol::of(&parts.headers).is_some() && code_in(&parts.headers).is_none()
}

/// A gRPC response ends without its status.
#[derive(Debug, thiserror::Error)]
#[error("it has no grpc-status")]
pub(crate) struct StatusMissing;

/// The HTTP status by which a response is judged: its own, or the one that stands for its gRPC
/// status. `is_asked`: the request is gRPC.
pub(crate) fn judged_status<B>(
    parts: &Parts,
    body: &Collected<B>,
    is_asked: bool,
) -> Result<StatusCode, StatusMissing> {
    let protocol = Protocol::of(&parts.headers);
    let is_grpc = protocol.is_some() || is_asked && parts.status == StatusCode::OK;
    if !is_grpc {
        return Ok(parts.status);
    }
    let code = code_in(&parts.headers).or_else(|| match body {
        Collected::Whole(whole) => code_at_end(whole, protocol),
        Collected::Partial(..) | Collected::Broken(_) => None,
    });
    match code {
        Some(code) => Ok(status_for(code)),
        // The status is still to come.
        None if matches!(body, Collected::Partial(..)) => Ok(parts.status),
        None if parts.status != StatusCode::OK => Ok(parts.status),
        None => Err(StatusMissing),
    }
}

fn code_at_end(body: &Buffered, protocol: Option<Protocol>) -> Option<u32> {
    let trailers = body.trailers.as_ref().and_then(code_in);
    trailers.or_else(|| match protocol? {
        Protocol::Grpc => None,
        Protocol::Web => code_in_frames(&body.data),
        Protocol::WebText => code_in_frames(&decoded(&body.data)),
    })
}

fn code_in(headers: &HeaderMap) -> Option<u32> {
    headers.get(&STATUS).map(|value| parsed(value.as_bytes()))
}

/// A status that is no number is an unknown one.
fn parsed(value: &[u8]) -> u32 {
    std::str::from_utf8(value).ok().and_then(|value| value.trim().parse().ok()).unwrap_or(UNKNOWN)
}

/// The status in the last frame of a gRPC-Web body, which holds the trailers.
fn code_in_frames(mut body: &[u8]) -> Option<u32> {
    while let Some((&[flags, a, b, c, d], rest)) = body.split_first_chunk::<5>() {
        let length = usize::try_from(u32::from_be_bytes([a, b, c, d])).ok()?;
        let frame = rest.get(..length)?;
        if flags & TRAILERS_FLAG != 0 {
            return frame.split(|byte| *byte == b'\n').find_map(code_in_line);
        }
        body = &rest[length..];
    }
    None
}

fn code_in_line(line: &[u8]) -> Option<u32> {
    let (name, value) = line.split_at_checked(line.iter().position(|byte| *byte == b':')?)?;
    name.trim_ascii().eq_ignore_ascii_case(STATUS.as_str().as_bytes()).then(|| parsed(&value[1..]))
}

/// Decodes Base64 that may be padded in the middle, where a server has joined pieces.
fn decoded(text: &[u8]) -> Vec<u8> {
    let mut data = Vec::with_capacity(text.len() / 4 * 3);
    for group in text.chunks(4) {
        let digits = group.iter().map_while(|byte| ALPHABET.iter().position(|digit| digit == byte));
        let (bits, count) = digits.fold((0_usize, 0), |(bits, count), digit| (bits << 6 | digit, count + 1));
        let bytes = (bits << (6 * (4 - count))).to_be_bytes();
        data.extend(bytes.iter().skip(bytes.len() - 3).take(count * 3 / 4));
    }
    data
}

/// Not always the usual mapping: a status after which clients repeat the call must not be stored.
fn status_for(code: u32) -> StatusCode {
    match code {
        OK => StatusCode::OK,
        CANCELLED => StatusCode::REQUEST_TIMEOUT,
        INVALID_ARGUMENT | FAILED_PRECONDITION | OUT_OF_RANGE => StatusCode::BAD_REQUEST,
        DEADLINE_EXCEEDED => StatusCode::GATEWAY_TIMEOUT,
        NOT_FOUND => StatusCode::NOT_FOUND,
        ALREADY_EXISTS => StatusCode::CONFLICT,
        PERMISSION_DENIED => StatusCode::FORBIDDEN,
        RESOURCE_EXHAUSTED => StatusCode::TOO_MANY_REQUESTS,
        ABORTED | UNAVAILABLE => StatusCode::SERVICE_UNAVAILABLE,
        UNIMPLEMENTED => StatusCode::NOT_IMPLEMENTED,
        UNAUTHENTICATED => StatusCode::UNAUTHORIZED,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// A refusal as a gRPC status without a message, for a request of this content type. Any other
/// response, and a refusal that is rendered as gRPC already, stays as it is.
pub(crate) fn translated<B>(
    response: Response<ResponseBody<B>>,
    content_type: HeaderValue,
) -> Response<ResponseBody<B>> {
    let (mut parts, body) = response.into_parts();
    let refusal = parts.extensions.get::<Rejection>().filter(|_| Protocol::of(&parts.headers).is_none());
    let Some(rejection) = refusal else { return Response::from_parts(parts, body) };
    for name in OF_HTTP {
        parts.headers.remove(name);
    }
    parts.headers.insert(header::CONTENT_TYPE, content_type);
    parts.headers.insert(STATUS, code_for(rejection).into());
    parts.headers.insert(MESSAGE, message(rejection));
    if let Some(pushback) = pushback(rejection) {
        parts.headers.insert(PUSHBACK, pushback);
    }
    parts.status = StatusCode::OK;
    Response::from_parts(parts, ResponseBody::default())
}

fn code_for(rejection: &Rejection) -> u32 {
    use RejectionCode as Code;
    match rejection.code() {
        Code::KeyMissing | Code::KeyInvalid | Code::KeyReused => INVALID_ARGUMENT,
        Code::ConsumerUnidentified => PERMISSION_DENIED,
        Code::RequestTooLarge => OUT_OF_RANGE,
        Code::RequestTimeout | Code::MaxExecutionExceeded => DEADLINE_EXCEEDED,
        Code::InProgress | Code::TransactionConflict => ABORTED,
        // Performed: a client that takes it for a success is right.
        Code::ResponseNotKept => ALREADY_EXISTS,
        Code::OutcomeUnknown if rejection.is_retryable() => UNAVAILABLE,
        // Never a status that means "not performed".
        Code::OutcomeUnknown | Code::TransactionEnded => UNKNOWN,
        Code::UpstreamRefused => FAILED_PRECONDITION,
        Code::Overloaded
        | Code::ShuttingDown
        | Code::StoreUnavailable
        | Code::TransactionLost
        | Code::OutcomePending
        | Code::UpstreamUnavailable
        | Code::RequestIncomplete
        | Code::FingerprintUnknown => UNAVAILABLE,
        Code::StoreMisconfigured
        | Code::RecordUnreadable
        | Code::RepresentationUnrenderable
        | Code::HandlerPanicked
        | Code::ResponseIncomplete
        | Code::TransactionFailed
        | Code::TransactionInUse
        | Code::IntentMisused
        | Code::NotGuarded
        | Code::Internal => INTERNAL,
    }
}

/// The code and the detail, percent-encoded as gRPC asks for.
fn message(rejection: &Rejection) -> HeaderValue {
    let mut message = String::new();
    for byte in format!("{}: {}", rejection.code(), rejection.detail()).bytes() {
        match byte {
            b' '..=b'~' if byte != b'%' => message.push(char::from(byte)),
            _ => {
                let _ = write!(message, "%{byte:02X}");
            }
        }
    }
    HeaderValue::from_str(&message).unwrap_or_else(|_| HeaderValue::from_static(""))
}

/// The milliseconds after which the client's own retries may come. Negative: never.
fn pushback(rejection: &Rejection) -> Option<HeaderValue> {
    if !rejection.is_retryable() {
        return Some(HeaderValue::from_static("-1"));
    }
    rejection.retry_after().map(|delay| u64::try_from(delay.as_millis()).unwrap_or(u64::MAX).into())
}

const OK: u32 = 0;
const CANCELLED: u32 = 1;
const UNKNOWN: u32 = 2;
const INVALID_ARGUMENT: u32 = 3;
const DEADLINE_EXCEEDED: u32 = 4;
const NOT_FOUND: u32 = 5;
const ALREADY_EXISTS: u32 = 6;
const PERMISSION_DENIED: u32 = 7;
const RESOURCE_EXHAUSTED: u32 = 8;
const FAILED_PRECONDITION: u32 = 9;
const ABORTED: u32 = 10;
const OUT_OF_RANGE: u32 = 11;
const UNIMPLEMENTED: u32 = 12;
const INTERNAL: u32 = 13;
const UNAVAILABLE: u32 = 14;
const UNAUTHENTICATED: u32 = 16;

const STATUS: HeaderName = HeaderName::from_static("grpc-status");
const MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
const PUSHBACK: HeaderName = HeaderName::from_static("grpc-retry-pushback-ms");

const GRPC: &[u8] = b"application/grpc";

/// Headers of a refusal that would be wrong beside a gRPC status.
const OF_HTTP: [HeaderName; 4] =
    [header::CONTENT_LENGTH, header::CONTENT_ENCODING, header::TRANSFER_ENCODING, header::RETRY_AFTER];

const TRAILERS_FLAG: u8 = 0x80;

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
