//! Power of hosts: `dalgu host power`.

use dalgu_proto::v1;
use tonic::{Request, Response, Status};

use super::parse;
use crate::{
    api::{Services, request},
    blocking::beside,
    model::Redfish,
    power::{PRINCIPAL, look},
    verbs::{
        Error,
        host_power::{self, Off},
    },
};

fn redfish(wire: v1::RedfishService) -> Redfish {
    Redfish {
        url: wire.url,
        system: wire.system,
        fingerprint: wire.fingerprint,
        credentials: wire.credentials,
    }
}

impl Services {
    pub(super) async fn set_power(
        &self,
        request: Request<v1::SetHostPowerRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        let message = request.get_ref();
        let name = parse("name", &message.name)?;
        let ca = self.config.power.ca.is_some();
        let given = message
            .redfish
            .clone()
            .map(|given| host_power::checked(redfish(given), ca));
        let given = given.transpose()?;
        let content = format!("SetHostPower {name} {given:?}");
        let caller = request::caller(&request, &message.request_id, &content)?;
        self.change_host(caller.clone(), |tx| {
            host_power::set(tx, &caller, name.as_str(), given)
        })
        .await?;
        self.host(&name)
    }

    pub(super) async fn read_power(
        &self,
        request: Request<v1::ReadHostPowerRequest>,
    ) -> Result<Response<v1::ReadHostPowerResponse>, Status> {
        let host = parse("name", &request.get_ref().name)?;
        let machine = host_power::redfish_of(&self.db.snapshot(), &host)?;
        let reading = self.power.read(&machine).await;
        let reading = reading.map_err(|error| Error::PowerFailed { host, error })?;
        Ok(Response::new(v1::ReadHostPowerResponse {
            power_state: reading.power_state,
            reset_types: reading.resets,
        }))
    }

    pub(super) async fn power_on(
        &self,
        request: Request<v1::PowerOnHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        let message = request.get_ref();
        let name = parse("name", &message.name)?;
        let caller = request::caller(&request, &message.request_id, &format!("PowerOnHost {name}"))?;
        let why = format!("asked for by {}", caller.principal);
        self.change_host(caller.clone(), |tx| {
            host_power::on(tx, &caller.principal, name.as_str(), &why)
        })
        .await?;
        self.host(&name)
    }

    pub(super) async fn power_off(
        &self,
        request: Request<v1::PowerOffHostRequest>,
    ) -> Result<Response<v1::Host>, Status> {
        let message = request.get_ref();
        let name = parse("name", &message.name)?;
        let how = Off {
            force: message.force,
            even_if_needed: message.even_if_needed,
        };
        let caller = request::caller(
            &request,
            &message.request_id,
            &format!("PowerOffHost {name} {how:?}"),
        )?;
        let (state, host, now) = (self.db.snapshot(), name.clone(), self.db.now());
        // A look at the whole site, beside the writer.
        let need = match how.even_if_needed {
            true => None,
            false => beside(move || look::needed(&state, &host, now)).await,
        };
        let why = format!("asked for by {}", caller.principal);
        self.change_host(caller.clone(), |tx| {
            host_power::off(tx, &caller.principal, name.as_str(), how, need, &why)
        })
        .await?;
        self.host(&name)
    }

    /// Wakes the host that a refusal names, where the site is set to.
    pub(in crate::api) async fn wake(&self, error: &Error) {
        let Error::NoCapacity {
            sleeper: Some(sleeper),
            ..
        } = error
        else {
            return;
        };
        if sleeper.is == look::Asleep::Wakes {
            let (host, why) = (sleeper.host.as_str(), "a creation found no room elsewhere");
            // Somebody else's refusal may have woken it by now.
            let _ = self
                .db
                .transact(|tx| host_power::on(tx, PRINCIPAL, host, why))
                .await;
        }
    }
}

/// How a host is switched on and off.
pub(in crate::api) fn to_wire(power: &crate::model::HostPower) -> v1::HostPower {
    let redfish = power.redfish.clone();
    v1::HostPower {
        redfish: Some(v1::RedfishService {
            url: redfish.url,
            system: redfish.system,
            fingerprint: redfish.fingerprint,
            credentials: redfish.credentials,
        }),
        since: Some(dalgu_proto::time::to_wire(power.since)),
        principal: power.principal.clone(),
        fault: power.fault.clone(),
        overdue: power.overdue,
    }
}
