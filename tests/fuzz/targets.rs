//! Readers of bytes from the network and from stores, fed with changed copies of the corpus beside this file.
//!
//! Each target runs some thousand inputs, the same each time. `FUZZ_SECONDS` has it run for that long, with other inputs
//! each time. A failure shows its input: put it into the corpus.

use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::Path,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{
    Fingerprinter, IdempotencyKey, KeySyntax,
    fingerprint::canonicalize,
    stored::{codec::Codec, response::StoredResponse},
};

#[test]
fn key_header() {
    fuzz("key", |input, _| {
        let name = HeaderName::from_static("idempotency-key");
        let Ok(value) = HeaderValue::from_bytes(input) else { return };
        let headers = HeaderMap::from_iter([(name.clone(), value.clone())]);
        let read = KeySyntax::default().read(&headers, &name);
        let value = value.as_bytes().trim_ascii();
        let expected = match value.first() {
            Some(b'"') => string_of_item(value),
            _ => String::from_utf8(value.to_vec()).ok().filter(|key| is_bare(key)),
        };
        let is_key = |key: &String| (1..=255).contains(&key.len()) && !key.trim_ascii().is_empty();
        let key = read.ok().flatten().map(|key| key.as_str().to_owned());
        assert_eq!(key, expected.filter(is_key).filter(|key| !is_reserved(key)));
        if let Some(key) = key {
            let quoted = format!("\"{}\"", key.replace('\\', r"\\").replace('"', "\\\""));
            let headers = HeaderMap::from_iter([(name.clone(), quoted.parse().unwrap())]);
            let again = KeySyntax::structured_field().read(&headers, &name).unwrap().unwrap();
            assert_eq!(again.as_str(), key);
        }
    });
}

#[test]
fn canonical_json() {
    fuzz("json", |one, other| {
        assert_differ_unless_strictly_equal(one, other);
        let Some(canonical) = canonicalize(one, &[]) else { return };
        assert_differ_unless_strictly_equal(one, &canonical);
        let meaning =
            meaning(one).unwrap_or_else(|| panic!("a strict parser refuses {}", one.escape_ascii()));
        // Whatever a strict parser and writer makes of it is the same, but for the numbers.
        let written = serde_json::to_vec(&meaning).unwrap();
        assert_eq!(canonicalize(&with_numbers(&written), &[]), Some(canonical));
    });
}

#[test]
fn stored_response() {
    fuzz("response", |payload, _| {
        let _ = StoredResponse::decode(&Bytes::copy_from_slice(payload));
        let Ok(response) = StoredResponse::decode(&sealed(payload)) else { return };
        let encoded = response.encode();
        let again = StoredResponse::decode(&encoded).unwrap();
        assert_eq!(again, response);
        assert_eq!(again.encode(), encoded);
    });
}

#[test]
fn kept_request() {
    fuzz("request", |payload, _| {
        let _ = Codec.read_request(&Bytes::copy_from_slice(payload));
        let Ok(request) = Codec.read_request(&sealed(payload)) else { return };
        let encode = |request: &http::Request<Bytes>| {
            let (method, target) = (request.method(), request.uri().to_string());
            Codec.request(method, &target, request.headers(), request.body())
        };
        let encoded = encode(&request);
        let again = Codec.read_request(&encoded).unwrap();
        assert_eq!(
            (again.method(), again.uri(), again.headers(), again.body()),
            (request.method(), request.uri(), request.headers(), request.body())
        );
        assert_eq!(encode(&again), encoded);
    });
}

fn assert_differ_unless_strictly_equal(one: &[u8], other: &[u8]) {
    let fingerprinter = Fingerprinter::default().canonical_json([]).unwrap();
    let head = http::Request::post("/").body(()).unwrap().into_parts().0;
    let fingerprint_of = |body: &[u8]| fingerprinter.fingerprint(&head, &Bytes::copy_from_slice(body));
    if one != other && fingerprint_of(one) == fingerprint_of(other) {
        let meaning_of =
            |text: &[u8]| meaning(text).unwrap_or_else(|| panic!("no JSON: {}", text.escape_ascii()));
        assert_eq!(meaning_of(one), meaning_of(other));
    }
}

/// The reference parser's reading of a String.
fn string_of_item(value: &[u8]) -> Option<String> {
    let item: sfv::Item = sfv::Parser::new(value).parse().ok()?;
    item.bare_item.as_string().map(|string| string.as_str().to_owned())
}

fn is_bare(key: &str) -> bool {
    key.bytes().all(|byte| byte.is_ascii_graphic() && !b"\",;\\".contains(&byte))
}

fn is_reserved(key: &str) -> bool {
    IdempotencyKey::new(key).is_ok_and(|key| key.is_derived())
}

/// The value of a text that a strict parser accepts, with its numbers as strings that begin with `#`.
fn meaning(text: &[u8]) -> Option<Value> {
    let text = std::str::from_utf8(text).ok()?;
    let (mut quoted, mut rest, mut in_string) = (String::new(), text, false);
    while let Some(first) = rest.chars().next() {
        let length = match (in_string, first) {
            (true, '\\') => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            (false, '-' | '0'..='9') => {
                let length = rest.bytes().take_while(|byte| b"0123456789+-.eE".contains(byte)).count();
                // Numbers that no float can hold are JSON too.
                let refused = serde_json::from_str::<Value>(&rest[..length]).err();
                if refused.is_some_and(|error| !error.to_string().starts_with("number out of range")) {
                    return None;
                }
                quoted.push_str(&format!("\"#{}\"", &rest[..length]));
                rest = &rest[length..];
                continue;
            }
            _ => first.len_utf8(),
        };
        in_string ^= first == '"';
        // Strings of the text begin with another character than numbers.
        quoted.push_str(if first == '"' && in_string { "\"=" } else { &rest[..length] });
        rest = &rest[length..];
    }
    serde_json::from_str(&quoted).ok()
}

/// Makes of the strings of [`meaning`] what they stand for.
fn with_numbers(text: &[u8]) -> Vec<u8> {
    let text = String::from_utf8(text.to_vec()).unwrap();
    let (mut out, mut rest) = (String::new(), text.as_str());
    while let Some(at) = rest.find('"') {
        out.push_str(&rest[..at]);
        let string = &rest[at..];
        let mut end = 1;
        while string.as_bytes()[end] != b'"' {
            end += if string.as_bytes()[end] == b'\\' { 2 } else { 1 };
        }
        match string[1..].strip_prefix('#') {
            Some(_) => out.push_str(&string[2..end]),
            None => out.push_str(&format!("\"{}", &string[2..=end])),
        }
        rest = &string[end + 1..];
    }
    (out + rest).into_bytes()
}

/// A payload with version 1 and a checksum that fits, so that its fields are read.
fn sealed(payload: &[u8]) -> Bytes {
    [&[1], &Sha256::digest(payload)[..8], payload].concat().into()
}

/// Calls the target with each file of the corpus and with changed copies. The second input is another copy of the first.
fn fuzz(target: &str, check: impl Fn(&[u8], &[u8])) {
    let seconds = std::env::var("FUZZ_SECONDS").ok().map(|seconds| seconds.parse().expect("a number"));
    let seed = if seconds.is_some() { uuid::Uuid::new_v4().as_u64_pair().0 } else { 1 };
    let (mut random, corpus) = (Random(seed), corpus(target));
    let (start, mut inputs) = (Instant::now(), 0);
    for one in &corpus {
        corpus.iter().for_each(|other| run(&check, one, other));
    }
    while seconds.map_or(inputs < 3000, |seconds| start.elapsed() < Duration::from_secs(seconds)) {
        let one = random.changed(&corpus);
        let other = random.changed(std::slice::from_ref(&one));
        run(&check, &one, &other);
        inputs += 1;
    }
    eprintln!("{target}: {inputs} inputs, {} files", corpus.len());
}

fn run(check: &impl Fn(&[u8], &[u8]), one: &[u8], other: &[u8]) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| check(one, other))) {
        eprintln!("the input was b\"{}\"\nbeside        b\"{}\"", one.escape_ascii(), other.escape_ascii());
        resume_unwind(panic);
    }
}

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
    let files = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path());
    let mut files: Vec<_> = files.collect();
    files.sort();
    assert!(!files.is_empty());
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

/// Numbers that look random and are the same for the same seed (SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        usize::try_from((mixed ^ (mixed >> 31)) % limit.max(1) as u64).unwrap()
    }

    fn changed(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        let mut input = corpus[self.below(corpus.len())].clone();
        for _ in 0..=self.below(3) {
            let (at, end) = (self.below(input.len() + 1), self.below(input.len() + 1));
            let (from, to) = (at.min(end), at.max(end).min(at.min(end) + 16));
            let other = &corpus[self.below(corpus.len())];
            match self.below(7) {
                0 => input.insert(at, TELLING[self.below(TELLING.len())]),
                1 if at < input.len() => input[at] = TELLING[self.below(TELLING.len())],
                2 if at < input.len() => input[at] ^= 1 << self.below(8),
                3 => drop(input.drain(from..to)),
                4 => {
                    let copy = input[from..to].to_vec();
                    input.splice(at..at, copy);
                }
                5 => drop(input.splice(from.., other[from.min(other.len())..].iter().copied())),
                _ => drop(input.splice(at..at, PIECES[self.below(PIECES.len())].iter().copied())),
            }
        }
        input
    }
}

/// Bytes at which readers decide.
const TELLING: &[u8] = b"\"\\,:;{}[]()+-.0159eEabut \t\r\n\0\x01\x1f\x7f\x80\xc3\xed\xff*%@?=/#";
const PIECES: &[&[u8]] = &[
    b"\\u0061",
    b"\\ud800",
    b"\\udc00",
    b"\xef\xbb\xbf",
    b"null",
    b"//",
    b"1e999",
    b";a=?1",
    b"\"\"",
    b"\0\0\0\0\0\0\0\x01",
];
