//! The head of a request, read alike over HTTP/1.1 and HTTP/2.

use http::{HeaderName, HeaderValue, Uri, header, request::Parts};

/// The URI as the client sent it.
pub(crate) fn original_uri(parts: &Parts) -> &Uri {
    #[cfg(feature = "axum")]
    let uri = parts.extensions.get::<axum::extract::OriginalUri>().map_or(&parts.uri, |original| &original.0);
    #[cfg(not(feature = "axum"))]
    let uri = &parts.uri;
    uri
}

/// The lines of a header as HTTP/1.1 writes them, without the space around their values.
///
/// The authority of the original URI counts as `Host`. Several lines of `Cookie` are one. A value
/// that is made of a sensitive one is sensitive.
pub(crate) fn lines_of(parts: &Parts, name: &HeaderName) -> Vec<HeaderValue> {
    let mut lines: Vec<_> = parts.headers.get_all(name).iter().map(trimmed).collect();
    if name == header::COOKIE && lines.len() > 1 {
        lines = joined(&lines).into_iter().collect();
    }
    if name == header::HOST
        && let Some(host) = host_of(original_uri(parts))
        && !lines.iter().any(|line| line.as_bytes().eq_ignore_ascii_case(host.as_bytes()))
    {
        lines.push(host);
    }
    lines
}

/// The only line of a header; `None` if there is none, or more than one.
pub(crate) fn only_line_of(parts: &Parts, name: &HeaderName) -> Option<HeaderValue> {
    let mut lines = lines_of(parts, name).into_iter();
    lines.next().filter(|_| lines.len() == 0)
}

/// HTTP/1.1 has removed the space already.
fn trimmed(value: &HeaderValue) -> HeaderValue {
    let bytes = value.as_bytes().trim_ascii();
    if bytes.len() == value.len() {
        return value.clone();
    }
    with_sensitivity(HeaderValue::from_bytes(bytes).unwrap_or_else(|_| value.clone()), value.is_sensitive())
}

fn joined(lines: &[HeaderValue]) -> Option<HeaderValue> {
    let bytes: Vec<&[u8]> = lines.iter().map(HeaderValue::as_bytes).collect();
    let value = HeaderValue::from_bytes(&bytes.join(&b"; "[..])).ok()?;
    Some(with_sensitivity(value, lines.iter().any(HeaderValue::is_sensitive)))
}

fn with_sensitivity(mut value: HeaderValue, sensitive: bool) -> HeaderValue {
    value.set_sensitive(sensitive);
    value
}

/// Host and port, without the credentials before them.
fn host_of(uri: &Uri) -> Option<HeaderValue> {
    let host = uri.host()?;
    let port = uri.port().map(|port| format!(":{port}")).unwrap_or_default();
    HeaderValue::from_str(&format!("{host}{port}")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(uri: &str, name: &HeaderName, values: &[&[u8]]) -> Vec<HeaderValue> {
        let mut parts = http::Request::builder().uri(uri).body(()).unwrap().into_parts().0;
        for value in values {
            parts.headers.append(name, HeaderValue::from_bytes(value).unwrap());
        }
        lines_of(&parts, name)
    }

    #[test]
    fn the_authority_counts_as_host() {
        let host = &header::HOST;
        assert_eq!(lines("http://u:p@a.example:81/x", host, &[]), ["a.example:81"]);
        assert_eq!(lines("/x", host, &[b"a.example:81"]), ["a.example:81"]);
        assert_eq!(lines("http://[::1]:81", host, &[b"[::1]:81"]), ["[::1]:81"]);
        assert_eq!(lines("http://A.example", host, &[b"a.example"]), ["a.example"]);
        assert_eq!(lines("http://a.example", host, &[b"b.example"]), ["b.example", "a.example"]);
    }

    #[test]
    fn lines_of_cookies_are_one() {
        assert_eq!(lines("/", &header::COOKIE, &[b"a=1", b"b=2; c=3"]), ["a=1; b=2; c=3"]);
        assert_eq!(lines("/", &header::ACCEPT, &[b"a", b"b "]), ["a", "b"]);
    }

    #[test]
    fn a_value_of_sensitive_lines_is_sensitive() {
        let mut parts = http::Request::new(()).into_parts().0;
        for line in ["a=1", "b=2"] {
            parts.headers.append("cookie", with_sensitivity(HeaderValue::from_static(line), line == "b=2"));
        }
        assert!(lines_of(&parts, &header::COOKIE)[0].is_sensitive());
    }
}
