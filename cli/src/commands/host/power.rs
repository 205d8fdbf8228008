//! `dalgu host power`.

use dalgu_proto::v1;

use super::{change, done, id};
use crate::{
    args::host::{PowerArgs, PowerCommand},
    commands::{Session, show::get},
    exit::Error,
    output::{self, Format, host::powered, human},
};

/// Does a command.
pub async fn run(args: PowerArgs, session: &mut Session<'_>) -> Result<(), Error> {
    let Some(command) = args.command else {
        return show(&args.name.unwrap_or_default(), session).await;
    };
    let (host, what) = match command {
        PowerCommand::On { name, request } => {
            let request = v1::PowerOnHostRequest {
                name,
                request_id: id(&request),
            };
            let call = change(session, async |client| {
                client.hosts().power_on_host(request.clone()).await
            });
            (
                call.await?,
                "being switched on; `dalgu host list` shows when it reports",
            )
        }
        PowerCommand::Off {
            name,
            force,
            even_if_needed,
            request,
        } => {
            let request = v1::PowerOffHostRequest {
                name,
                force,
                even_if_needed,
                request_id: id(&request),
            };
            let call = change(session, async |client| {
                client.hosts().power_off_host(request.clone()).await
            });
            (
                call.await?,
                "being switched off, and takes no VMs; `dalgu host list` shows when it is off",
            )
        }
        PowerCommand::Set {
            name,
            redfish,
            system,
            fingerprint,
            credentials,
            request,
        } => {
            let redfish = v1::RedfishService {
                url: redfish,
                system,
                fingerprint,
                credentials,
            };
            let host = set(name, Some(redfish), id(&request), session).await?;
            (
                host,
                "switched on and off by this; `dalgu host power` asks whether it answers",
            )
        }
        PowerCommand::Unset { name, request } => (
            set(name, None, id(&request), session).await?,
            "not switched on and off any more",
        ),
    };
    done(session, &host, what)
}

async fn set(
    name: String,
    redfish: Option<v1::RedfishService>,
    request_id: String,
    session: &mut Session<'_>,
) -> Result<v1::Host, Error> {
    let request = v1::SetHostPowerRequest {
        name,
        redfish,
        request_id,
    };
    change(session, async |client| {
        client.hosts().set_host_power(request.clone()).await
    })
    .await
}

/// Shows what is known here, and what the management controller says now.
async fn show(name: &str, session: &mut Session<'_>) -> Result<(), Error> {
    let host: v1::Host = get(&session.client, name).await?;
    let request = v1::ReadHostPowerRequest {
        name: name.to_owned(),
    };
    let read = session
        .client
        .call(async |client| client.hosts().read_host_power(request.clone()).await);
    if !matches!(session.format, Format::Table | Format::Wide) {
        read.await?;
        return output::one(session.term, session.format, &host);
    }
    let read = read.await;
    let mut page = human::Page::default();
    page.line("Name", &host.name)
        .line("State", human::value::<v1::HostState>(host.state));
    if let Some(power) = &host.power {
        powered(&mut page, power, (session.term.now)());
    }
    if let Ok(read) = &read {
        page.line("Machine", &read.power_state)
            .line("Can be asked for", human::or_dash(&read.reset_types.join(", ")));
    }
    session.term.print(&page.render(session.term.color))?;
    Ok(read.map(|_| ())?)
}
