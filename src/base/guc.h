/*-------------------------------------------------------------------------
 *
 * guc.h
 *	  Settings of pg_redrive.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_GUC_H
#define REDRIVE_GUC_H

extern bool redrive_enabled;
extern char *redrive_http_allow_cidr;
extern char *redrive_http_ca_file;
extern char *redrive_http_ports;
extern int	redrive_max_databases;
extern int	redrive_max_workers;
extern int	redrive_pass_time_budget;
extern int	redrive_push_max_in_flight; /* seconds */
extern int	redrive_worker_idle_timeout;	/* milliseconds */

extern void redrive_define_settings(bool preloading);
extern bool redrive_port_listed(int port);
extern void redrive_take_signals(pqsigfunc on_terminate);

#endif							/* REDRIVE_GUC_H */
