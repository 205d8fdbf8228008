//! Metric families written from values at hand.
//!
//! Used by the sibling modules. A name is written out in full, `_total` and `_info` included, where it is used, so that a search finds it;
//! the unit is taken from its end. A family without series is left out. (The encoder writes `{}` for an
//! empty set of labels, so those with none go past it.)

use std::fmt;

use prometheus_client::{
    encoding::{
        DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, EncodeLabel, EncodeLabelSet, NoLabelSet,
    },
    metrics::{MetricType, exemplar::Exemplar},
    registry::Unit,
};

/// The page being written.
pub(super) struct Page<'a>(DescriptorEncoder<'a>);

/// No exemplar, of the type the encoder wants.
const NO_EXEMPLAR: Option<&Exemplar<NoLabelSet, f64>> = None;

/// Labels of any number, for the encoder.
#[derive(Debug)]
struct Labels<L>(L);

impl<L: EncodeLabel, const N: usize> EncodeLabelSet for Labels<[L; N]> {
    fn encode(&self, encoder: &mut prometheus_client::encoding::LabelSetEncoder<'_>) -> fmt::Result {
        self.0
            .iter()
            .try_for_each(|label| label.encode(encoder.encode_label()))
    }
}

impl<'a> Page<'a> {
    pub(super) fn new(encoder: DescriptorEncoder<'a>) -> Self {
        Self(encoder)
    }

    /// A family of counters; the name ends in `_total`.
    pub(super) fn counters<'l, V: EncodeCounterValue, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = ([(&'static str, &'l str); N], V)>,
    ) -> fmt::Result {
        let mut series = series.into_iter().peekable();
        if series.peek().is_none() {
            return Ok(());
        }
        let (stem, unit) = split(name.strip_suffix("_total").unwrap_or(name));
        let mut family = self
            .0
            .encode_descriptor(stem, help, unit.as_ref(), MetricType::Counter)?;
        for (labels, value) in series {
            if N == 0 {
                family.encode_counter(&value, NO_EXEMPLAR)?;
            } else {
                family
                    .encode_family(&Labels(labels))?
                    .encode_counter(&value, NO_EXEMPLAR)?;
            }
        }
        Ok(())
    }

    /// A family of gauges.
    pub(super) fn gauges<'l, V: EncodeGaugeValue, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = ([(&'static str, &'l str); N], V)>,
    ) -> fmt::Result {
        let mut series = series.into_iter().peekable();
        if series.peek().is_none() {
            return Ok(());
        }
        let (stem, unit) = split(name);
        let mut family = self
            .0
            .encode_descriptor(stem, help, unit.as_ref(), MetricType::Gauge)?;
        for (labels, value) in series {
            if N == 0 {
                family.encode_gauge(&value)?;
            } else {
                family.encode_family(&Labels(labels))?.encode_gauge(&value)?;
            }
        }
        Ok(())
    }

    /// A family that tells by its labels what something is; the name ends in `_info`.
    pub(super) fn infos<'l, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = [(&'static str, &'l str); N]>,
    ) -> fmt::Result {
        let mut series = series.into_iter().peekable();
        if series.peek().is_none() {
            return Ok(());
        }
        let stem = name.strip_suffix("_info").unwrap_or(name);
        let mut family = self.0.encode_descriptor(stem, help, None, MetricType::Info)?;
        series.try_for_each(|labels| family.encode_info(&Labels(labels)))
    }

    /// One gauge without labels.
    pub(super) fn gauge(&mut self, name: &str, help: &str, value: impl EncodeGaugeValue) -> fmt::Result {
        let (stem, unit) = split(name);
        self.0
            .encode_descriptor(stem, help, unit.as_ref(), MetricType::Gauge)?
            .encode_gauge(&value)
    }
}

/// A name without its unit, and the unit.
fn split(name: &str) -> (&str, Option<Unit>) {
    let units = [
        ("_bytes_per_second", Unit::Other("bytes_per_second".to_owned())),
        ("_bytes", Unit::Bytes),
        ("_seconds", Unit::Seconds),
    ];
    let found = units
        .into_iter()
        .find_map(|(suffix, unit)| Some((name.strip_suffix(suffix)?, unit)));
    found.map_or((name, None), |(stem, unit)| (stem, Some(unit)))
}
