/*-------------------------------------------------------------------------
 *
 * secret_log.h
 *	  Keep secrets out of the server log.
 *
 *-------------------------------------------------------------------------
 */
#ifndef REDRIVE_SECRET_LOG_H
#define REDRIVE_SECRET_LOG_H

extern void redrive_install_log_hook(void);

#endif							/* REDRIVE_SECRET_LOG_H */
