//! What makes a host better than another: by what the room that is left is judged ([`Fit`]), and the order in which the parts of a score are
//! compared ([`Order`]). Read from the configuration; [`super::score`] and the engine go by it.
//!
//! The engine keeps hosts in the order of what comes before the reservations, then of the reservations, then of the rest: two numbers that hold
//! the values of the other parts, the first part in the highest bits. So an order may have any parts in any places, but for two things:
//! the reservations are in it, and of the two parts that depend on the request what is asked for and not required does not come after them, and which images a host lacks is the last.

use serde::Deserialize;

/// How many parts there are.
const PARTS: usize = Term::ALL.len();

/// What a score has parts of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Term {
    /// How much the host goes against what is only preferred.
    AgainstPreferences,
    /// Nothing is known of the host's load.
    NoTelemetry,
    /// Step of the host's load, 0 to 3.
    Pressure,
    /// Step of the busiest network interface, 0 to 4.
    Network,
    /// Step of what is reserved there before the VM comes, 0 or 1.
    ReservedStep,
    /// What is reserved or left there with the VM, as [`Fit`] says.
    Reserved,
    /// Busy processors, in steps of 5 %.
    CpuBusyPercent,
    /// Use of the busiest network interface, in steps of 5 %.
    NetworkBusyPercent,
    /// Images of the VM that the host would have to fetch, 0 to 7.
    ImagesMissing,
}

impl Term {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::AgainstPreferences,
        Self::NoTelemetry,
        Self::Pressure,
        Self::Network,
        Self::ReservedStep,
        Self::Reserved,
        Self::CpuBusyPercent,
        Self::NetworkBusyPercent,
        Self::ImagesMissing,
    ];

    /// As the configuration and a decision have it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::AgainstPreferences => "against_preferences",
            Self::NoTelemetry => "no_telemetry",
            Self::Pressure => "pressure",
            Self::Network => "network",
            Self::ReservedStep => "reserved_step",
            Self::Reserved => "reserved",
            Self::CpuBusyPercent => "cpu_busy_percent",
            Self::NetworkBusyPercent => "network_busy_percent",
            Self::ImagesMissing => "images_missing",
        }
    }

    /// Bits that its greatest value takes; the reservations have a place of their own.
    const fn bits(self) -> u8 {
        match self {
            Self::AgainstPreferences => 32,
            Self::NoTelemetry | Self::ReservedStep => 1,
            Self::Pressure => 2,
            Self::Network | Self::ImagesMissing => 3,
            Self::Reserved => 0,
            Self::CpuBusyPercent | Self::NetworkBusyPercent => 5,
        }
    }
}

/// By what the room on hosts of the same load is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// The host of which the least is reserved then, first.
    Spread,
    /// The host with the least left then, first.
    Pack,
}

/// The order in which the parts of a score are compared; what is left out does not count, and the host's name ends every tie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Vec<Term>")]
pub struct Order {
    /// `None` after the last.
    terms: [Option<Term>; PARTS],
    /// Where the value of each part is, by its number.
    places: [Place; PARTS],
}

/// Where the value of a part is: so many bits from the lower end of one of two numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Of what comes before the reservations.
    Before(u8),
    /// Of what comes after them.
    After(u8),
    /// It does not count.
    Nowhere,
}

/// Parts that come before the reservations and depend on the host alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) struct Steps(u64);

/// All parts that come before the reservations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Lead(u64);

/// Parts that come after the reservations; of a host in the index, without the last one, which depends on the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) struct Busy(u32);

impl Order {
    /// In this order, which [`Order::try_from`] would accept.
    const fn new(terms: &[Term]) -> Self {
        let mut order = Self {
            terms: [None; PARTS],
            places: [Place::Nowhere; PARTS],
        };
        let (mut at, mut bits, mut before) = (terms.len(), 0, false);
        while at > 0 {
            at -= 1;
            let term = terms[at];
            order.terms[at] = Some(term);
            if matches!(term, Term::Reserved) {
                (bits, before) = (0, true);
            } else {
                order.places[term as usize] = match before {
                    true => Place::Before(bits),
                    false => Place::After(bits),
                };
                bits += term.bits();
            }
        }
        order
    }

    /// Its parts, first to last.
    pub(super) fn terms(&self) -> impl Iterator<Item = Term> {
        self.terms.into_iter().flatten()
    }

    /// What these parts of a host come to, before the reservations and after them.
    pub(super) fn load(&self, values: impl IntoIterator<Item = (Term, u8)>) -> (Steps, Busy) {
        let (mut steps, mut busy) = (Steps::default(), Busy::default());
        for (term, value) in values {
            match self.places[term as usize] {
                Place::Before(bits) => steps.0 |= u64::from(value) << bits,
                Place::After(bits) => busy.0 |= u32::from(value) << bits,
                Place::Nowhere => {}
            }
        }
        (steps, busy)
    }

    /// What comes before the reservations on a host that goes so much against what is only preferred.
    pub(super) fn lead(&self, steps: Steps, against: u32) -> Lead {
        match self.places[Term::AgainstPreferences as usize] {
            Place::Before(bits) => Lead(steps.0 | u64::from(against) << bits),
            Place::After(_) | Place::Nowhere => Lead(steps.0),
        }
    }

    /// What comes after the reservations on a host that would have to fetch so many of a VM's images.
    pub(super) fn tail(&self, busy: Busy, images_missing: u8) -> Busy {
        match self.places[Term::ImagesMissing as usize] {
            Place::After(bits) => Busy(busy.0 | u32::from(images_missing) << bits),
            Place::Before(_) | Place::Nowhere => busy,
        }
    }

    /// The value of a part; 0 where it does not count.
    pub(super) fn value(&self, term: Term, lead: Lead, busy: Busy) -> u32 {
        let shifted = match self.places[term as usize] {
            Place::Before(bits) => lead.0 >> bits,
            Place::After(bits) => u64::from(busy.0 >> bits),
            Place::Nowhere => 0,
        };
        u32::try_from(shifted & ((1 << term.bits()) - 1)).unwrap_or(u32::MAX)
    }
}

impl TryFrom<Vec<Term>> for Order {
    type Error = String;

    fn try_from(terms: Vec<Term>) -> Result<Self, String> {
        let place = |wanted: Term| terms.iter().position(|term| *term == wanted);
        let names = || Term::ALL.map(Term::as_str).join(", ");
        if let Some((_, twice)) = terms
            .iter()
            .enumerate()
            .find(|(at, term)| place(**term) != Some(*at))
        {
            let twice = twice.as_str();
            return Err(format!(
                "{twice} is there twice: name each part once, of {}",
                names()
            ));
        }
        let Some(reserved) = place(Term::Reserved) else {
            return Err(format!(
                "reserved is missing: it tells hosts of the same load apart; name it last if it is to count for little. The parts are {}",
                names()
            ));
        };
        if place(Term::AgainstPreferences).is_some_and(|against| against > reserved) {
            return Err(
                "against_preferences comes after reserved, where it would decide only between hosts with the same room to the millionth: \
                 name it before that, or leave it out"
                    .to_owned(),
            );
        }
        if place(Term::ImagesMissing).is_some_and(|at| at + 1 < terms.len()) {
            return Err(
                "images_missing is not the last: it depends on the request, and hosts are kept in the order of all other parts; name it last, or leave it out"
                    .to_owned(),
            );
        }
        Ok(Self::new(&terms))
    }
}

/// What makes a host better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// By what the room is judged.
    pub fit: Fit,
    /// What is compared, in which order.
    pub order: Order,
}

/// A policy by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Named {
    /// [`Policy::SPREAD`].
    #[default]
    Spread,
    /// [`Policy::PACK`].
    Pack,
    /// [`Policy::BALANCED`].
    Balanced,
}

impl Policy {
    /// Room to grow everywhere, and the least lost with one host. Load still comes first.
    pub const SPREAD: Self = Self {
        fit: Fit::Spread,
        order: ORDER,
    };
    /// Whole hosts stay empty. Load still comes first.
    pub const PACK: Self = Self {
        fit: Fit::Pack,
        order: ORDER,
    };
    /// As [`Policy::PACK`], but a host that is filled that far waits until no other one has room.
    pub const BALANCED: Self = Self {
        fit: Fit::Pack,
        order: Order::new(&[
            Term::AgainstPreferences,
            Term::NoTelemetry,
            Term::Pressure,
            Term::Network,
            Term::ReservedStep,
            Term::Reserved,
            Term::CpuBusyPercent,
            Term::NetworkBusyPercent,
            Term::ImagesMissing,
        ]),
    };
}

/// Of the policies that go by no step of what is reserved.
const ORDER: Order = Order::new(&[
    Term::AgainstPreferences,
    Term::NoTelemetry,
    Term::Pressure,
    Term::Network,
    Term::Reserved,
    Term::CpuBusyPercent,
    Term::NetworkBusyPercent,
    Term::ImagesMissing,
]);

impl Default for Policy {
    fn default() -> Self {
        Named::default().into()
    }
}

impl From<Named> for Policy {
    fn from(name: Named) -> Self {
        match name {
            Named::Spread => Self::SPREAD,
            Named::Pack => Self::PACK,
            Named::Balanced => Self::BALANCED,
        }
    }
}
