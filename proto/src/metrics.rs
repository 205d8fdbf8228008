//! Metrics pages for Prometheus: which format a scraper gets, and how a registry becomes that text.
//!
//! Called by the /metrics handlers of both daemons. OpenMetrics is given to whoever asks for it; everybody else
//! (curl, `promtool check metrics`, old scrapers) gets the Prometheus text format 0.0.4, which is made from the
//! same page, so that both always say the same.

use std::fmt::{self, Write};

use prometheus_client::{encoding::text, registry::Registry};

/// A text format that Prometheus reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// OpenMetrics 1.0.0.
    OpenMetrics,
    /// Prometheus text format 0.0.4.
    Text,
}

impl Format {
    /// The `Content-Type` of a page of this format.
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }
}

/// The format for a scraper that sent this `Accept` header: OpenMetrics where the header names it, in a version
/// we speak, with at least the weight of plain text; otherwise plain text. A wildcard asks for nothing special.
pub fn negotiate(accept: Option<&str>) -> Format {
    let (mut open_metrics, mut plain) = (0.0, 0.0);
    for range in accept.unwrap_or_default().split(',') {
        let mut parts = range.split(';').map(str::trim);
        let media_type = parts.next().unwrap_or_default();
        let (mut weight, mut known_version) = (1.0_f64, true);
        for (key, value) in parts.filter_map(|part| part.split_once('=')) {
            match key.trim() {
                "q" => weight = value.trim().parse().unwrap_or(0.0),
                "version" => known_version = matches!(value.trim().trim_matches('"'), "1.0.0" | "0.0.1"),
                _ => {}
            }
        }
        if media_type.eq_ignore_ascii_case("application/openmetrics-text") && known_version {
            open_metrics = weight.max(open_metrics);
        } else if media_type.eq_ignore_ascii_case("text/plain") {
            plain = weight.max(plain);
        }
    }
    if open_metrics > 0.0 && open_metrics >= plain {
        Format::OpenMetrics
    } else {
        Format::Text
    }
}

/// The page of a registry.
///
/// # Errors
/// When a collector of the registry fails to write itself.
pub fn render(registry: &Registry, format: Format) -> Result<String, fmt::Error> {
    let mut page = String::with_capacity(16 * 1024);
    text::encode(&mut page, registry)?;
    match format {
        Format::OpenMetrics => Ok(page),
        Format::Text => plain(&page),
    }
}

/// Content type and page for a scraper that sent this `Accept` header.
///
/// # Errors
/// As [`render`].
pub fn respond(accept: Option<&str>, registry: &Registry) -> Result<(&'static str, String), fmt::Error> {
    let format = negotiate(accept);
    Ok((format.content_type(), render(registry, format)?))
}

/// Rewrites an OpenMetrics page into the text format: families take the names of their samples (`_total`,
/// `_info`), types that format does not know get their nearest, units, exemplars and the end mark go.
fn plain(page: &str) -> Result<String, fmt::Error> {
    let mut out = String::with_capacity(page.len());
    // The help line comes before the type line that tells the family's name in this format.
    let mut help = None;
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ');
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            let (suffix, kind) = match kind {
                "counter" => ("_total", "counter"),
                "info" => ("_info", "gauge"),
                "unknown" => ("", "untyped"),
                other => ("", other),
            };
            if let Some((_, text)) = help.take().filter(|(of, _)| *of == name) {
                writeln!(out, "# HELP {name}{suffix} {text}")?;
            }
            writeln!(out, "# TYPE {name}{suffix} {kind}")?;
        } else if !line.starts_with('#') && !line.is_empty() {
            writeln!(out, "{}", without_exemplar(line))?;
        }
    }
    Ok(out)
}

/// A sample's line up to its exemplar. A `#` inside a quoted label value does not begin one.
fn without_exemplar(line: &str) -> &str {
    let (mut quoted, mut escaped) = (false, false);
    for (at, byte) in line.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'#' if !quoted => return line[..at].trim_end(),
            _ => {}
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use prometheus_client::{
        metrics::{
            counter::Counter, exemplar::CounterWithExemplar, family::Family, gauge::Gauge, info::Info,
        },
        registry::Unit,
    };

    use super::*;

    #[test]
    fn only_who_asks_for_openmetrics_gets_it() {
        use Format::{OpenMetrics, Text};
        let prometheus = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;\
                          q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
        for (accept, expected) in [
            (None, Text),
            (Some(""), Text),
            (Some("*/*"), Text),
            (Some("text/html, application/xhtml+xml;q=0.9"), Text),
            (Some(prometheus), OpenMetrics),
            (Some("application/openmetrics-text"), OpenMetrics),
            (
                Some("Application/OpenMetrics-Text; version=\"1.0.0\"; charset=utf-8"),
                OpenMetrics,
            ),
            (Some("application/openmetrics-text; version=2.0.0"), Text),
            (Some("application/openmetrics-text;q=0"), Text),
            (Some("application/openmetrics-text;q=0.3, text/plain;q=0.7"), Text),
            (Some("application/openmetrics-text;q=nonsense"), Text),
        ] {
            assert_eq!(negotiate(accept), expected, "{accept:?}");
        }
    }

    fn registry() -> Registry {
        let mut registry = Registry::default();
        let counter = Counter::<u64>::default();
        counter.inc_by(3);
        registry.register("requests", "Requests served", counter);
        let family = Family::<[(&str, &str); 1], Gauge>::default();
        family.get_or_create(&[("path", "a \"# b\\\n")]).set(4);
        registry.register_with_unit("room", "Room left", Unit::Bytes, family);
        registry.register("build", "About the build", Info::new([("version", "1")]));
        let exemplar = CounterWithExemplar::<[(&str, &str); 1]>::default();
        exemplar.inc_by(1, Some([("trace", "x")]), None);
        registry.register("traced", "With an exemplar", exemplar);
        registry
    }

    #[test]
    fn the_text_format_names_families_as_their_samples() {
        let page = render(&registry(), Format::Text).unwrap();
        assert_eq!(
            page,
            "# HELP requests_total Requests served.\n# TYPE requests_total counter\nrequests_total 3\n\
             # HELP room_bytes Room left.\n# TYPE room_bytes gauge\nroom_bytes{path=\"a \\\"# b\\\\\\n\"} 4\n\
             # HELP build_info About the build.\n# TYPE build_info gauge\nbuild_info{version=\"1\"} 1\n\
             # HELP traced_total With an exemplar.\n# TYPE traced_total counter\ntraced_total 1\n"
        );
    }

    #[test]
    fn an_openmetrics_page_has_units_and_an_end_mark() {
        let (content_type, page) = respond(Some("application/openmetrics-text"), &registry()).unwrap();
        assert_eq!(
            content_type,
            "application/openmetrics-text; version=1.0.0; charset=utf-8"
        );
        assert!(page.contains("# UNIT room_bytes bytes\n"), "{page}");
        assert!(page.ends_with("# EOF\n"), "{page}");
    }
}
